"""GPT-3 175B (Brown et al., 2020): 96 layers of width 12,288 with 96 heads, context 2,048, for 1,024 TPU v5p chips.

Command:  gptjax train --config=configs/gpt3_175b.py --workdir=runs/gpt3 --config.data.path='corpus/*.jsonl' \\
              --config.data.tokenizer_path=gpt2_bpe
          The folder gpt2_bpe holds encoder.json and vocab.bpe. Ask first whether it fits:
          gptjax plan --config=configs/gpt3_175b.py --topology=v5p:8x8x16
Cost:     300 B tokens at 1.1e12 FLOPs each are 3.2e23 FLOPs; some 13 to 21 days by experiments/plans.
Expected: not run here.
"""

from gptjax import config as schema


def get_config(arg: str = ""):
    config = schema.defaults()
    config.model.num_layers, config.model.num_heads, config.model.model_dim = 96, 96, 12288
    config.model.vocab_size = 50304  # 50,257 rounded up to a multiple of 128, which matrix units like
    config.model.max_seq_len = 2048
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "gpt2"
    config.data.tokenizer_path = "gpt2_bpe"
    config.data.eval_fraction = 0.0001
    config.data.seq_len = 2048
    config.data.batch_size = 1536  # 1536 * 2048 = 3.1 M tokens a step; the paper's is 3.2 M

    config.optimizer.learning_rate = 6e-5
    config.optimizer.warmup_tokens = 375_000_000
    config.optimizer.decay_tokens = 260_000_000_000
    config.train.duration_tokens = 300_000_000_000
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 256, 4
    config.evaluate.every_steps = 1000
    config.evaluate.max_batches = 20
    config.checkpoint.every_steps = 500
    return config
