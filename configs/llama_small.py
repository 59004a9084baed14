"""A Llama-shaped decoder of 110 M parameters: rotary positions, RMSNorm, SwiGLU, grouped keys and values, no biases.

Command:  gptjax train --config=configs/llama_small.py --workdir=runs/llama --config.data.path='corpus/*.jsonl'
          A SentencePiece model of 32,000 pieces is trained on the corpus at the start; give one with
          --config.data.tokenizer_path.
Cost:     20,000 steps of 262,144 tokens are 5.2 B tokens, about 3.5e18 FLOPs: some 8 hours on an A100 at 40 % of its peak.
Expected: not run here.
"""

from gptjax import config as schema


def get_config(arg: str = ""):
    config = schema.defaults()
    config.model.num_layers = 12
    config.model.model_dim = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 4
    config.model.mlp_dim = 2048  # 8/3 * 768: three matrices cost what two of 4 * 768 would
    config.model.max_seq_len = 2048
    config.model.norm = "rmsnorm"
    config.model.position = "rotary"
    config.model.activation = "silu"
    config.model.gated_mlp = True
    config.model.attention_bias = False
    config.model.mlp_bias = False
    config.model.tied_embeddings = False
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"

    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "sentencepiece"
    config.data.tokenizer_vocab_size = 32000
    config.data.eval_fraction = 0.001
    config.data.seq_len = 2048
    config.data.batch_size = 128  # 128 * 2048 = 262,144 tokens a step

    config.objective.z_loss = 1e-4
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 500
    config.optimizer.decay_steps = 4000
    config.optimizer.final_fraction = 0.0
    config.train.duration_steps = 20_000
    config.train.accumulation_steps = 4
    config.evaluate.every_steps = 1000
    config.evaluate.max_batches = 100
    config.evaluate.sample_tokens = 200
    config.checkpoint.every_steps = 1000
    return config
