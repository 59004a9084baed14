"""A small GPT on the Python standard library's own source: what `make train` runs. Nothing is downloaded.

Command:  gptjax train --config=configs/stdlib_tiny.py --workdir=runs/stdlib_tiny
Cost:     TBD
Expected: TBD
"""

from gptjax import config as schema


def get_config(arg: str = ""):
    config = schema.defaults()
    config.data.source = "stdlib"
    config.data.tokenizer = "byte"
    config.data.seq_len = 128
    config.data.batch_size = 16

    config.model.num_layers = 4
    config.model.model_dim = 128
    config.model.num_heads = 4
    config.model.max_seq_len = 512
    config.model.position = "rotary"
    config.model.norm = "rmsnorm"

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.05

    config.train.duration_steps = 1500
    config.metrics.every_steps = 10
    config.evaluate.every_steps = 500
    config.evaluate.max_batches = 50
    config.evaluate.sample_prompt = "def "
    config.evaluate.sample_tokens = 200
    config.checkpoint.every_steps = 250
    return config
