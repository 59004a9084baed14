"""Llama 2 7B (Touvron et al., 2023): 32 layers of width 4,096, RMSNorm, rotary positions, SwiGLU, context 4,096, for 64 TPU v5p
chips.

Command:  gptjax train --config=configs/llama_7b.py --workdir=runs/llama_7b --config.data.path='corpus/*.jsonl' \\
              --config.data.tokenizer_path=tokenizer.model
          tokenizer.model is a SentencePiece model of 32,000 pieces. Ask first whether it fits:
          gptjax plan --config=configs/llama_7b.py --topology=v5p:4x4x4
Cost:     2 T tokens at 4.6e10 FLOPs each are 9.2e22 FLOPs; some 77 to 81 days by experiments/plans.
Expected: not run here.
"""

from gptjax import config as schema


def get_config(arg: str = ""):
    config = schema.defaults()
    config.model.vocab_size = 32000
    config.model.num_layers, config.model.num_heads, config.model.model_dim = 32, 32, 4096
    config.model.mlp_dim = 11008
    config.model.max_seq_len = 4096
    config.model.norm = "rmsnorm"
    config.model.position = "rotary"
    config.model.activation = "silu"
    config.model.gated_mlp = True
    config.model.attention_bias = False
    config.model.mlp_bias = False
    config.model.tied_embeddings = False
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "sentencepiece"
    config.data.tokenizer_path = "tokenizer.model"
    config.data.eval_fraction = 0.0001
    config.data.seq_len = 4096
    config.data.batch_size = 1024  # 1024 * 4096 = 4.2 M tokens a step, as in the paper

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.train.duration_tokens = 2_000_000_000_000
    config.train.accumulation_steps = 4
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.evaluate.every_steps = 1000
    config.evaluate.max_batches = 20
    config.checkpoint.every_steps = 500
    return config
