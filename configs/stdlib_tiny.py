"""A small GPT on the Python standard library's own source: what `make train` runs. Nothing is downloaded.

Command:  gptjax train --config=configs/stdlib_tiny.py --workdir=runs/stdlib_tiny
Cost:     3 minutes on 2 CPU cores.
Expected: evaluation loss 1.27 nats a byte, 1.83 bits per byte, with Python 3.11's library (each Python has its own).
"""

from gptjax import config as schema


def get_config(arg: str = ""):
    config = schema.defaults()
    config.data.source = "stdlib"
    config.data.tokenizer = "byte"
    config.data.seq_len = 256
    config.data.batch_size = 8  # 8 * 256 = 2,048 tokens a step, 1.2 M in all
    config.data.eval_fraction = 0.03

    config.model.num_layers = 4
    config.model.model_dim = 128
    config.model.num_heads = 4
    config.model.max_seq_len = 256
    config.model.position = "rotary"
    config.model.norm = "rmsnorm"
    config.model.scan_unroll = 0  # faster on a CPU

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.muon_adam_learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.0

    config.train.duration_steps = 600
    config.metrics.every_steps = 10
    config.evaluate.every_steps = 200
    config.evaluate.batch_size = 16
    config.evaluate.max_batches = 10
    config.evaluate.sample_prompt = "def "
    config.evaluate.sample_tokens = 300
    config.checkpoint.every_steps = 100
    return config
