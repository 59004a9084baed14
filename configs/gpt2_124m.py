"""GPT-2 (Radford et al., 2019) from scratch on text of your own, and its larger sisters by argument.

Command:  gptjax train --config=configs/gpt2_124m.py --workdir=runs/gpt2 --config.data.path='corpus/*.jsonl' \\
              --config.data.tokenizer_path=gpt2_bpe
          `:medium` (355M), `:large` (774M) and `:xl` (1.6B) are the sisters. The folder gpt2_bpe holds encoder.json and
          vocab.bpe.
Cost:     600,000 steps of 491,520 tokens are 295 B tokens; at 6 * 124 M FLOPs a token, 2.2e20 FLOPs: four days
          on 8 A100 for nanoGPT.
Expected: on OpenWebText about 2.85 validation loss after those steps (nanoGPT's figure); not run here.
"""

from gptjax import config as schema

# (layers, heads, width): 124M, 355M, 774M, 1558M parameters
SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}


def get_config(arg: str = "small"):
    if arg not in SIZES:
        raise schema.UserError(f"configs/gpt2_124m.py has no size {arg!r}; it has {', '.join(SIZES)}.")
    config = schema.defaults()
    config.model.num_layers, config.model.num_heads, config.model.model_dim = SIZES[arg]
    config.model.vocab_size = 50304  # 50,257 rounded up to a multiple of 128, which matrix units like
    config.model.max_seq_len = 1024
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"

    config.data.source = "jsonl"
    config.data.path = "corpus/*.jsonl"
    config.data.tokenizer = "gpt2"
    config.data.tokenizer_path = "gpt2_bpe"
    config.data.eval_fraction = 0.001
    config.data.seq_len = 1024
    config.data.batch_size = 480  # 480 * 1024 = 491,520 tokens a step

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 2000
    config.train.duration_steps = 600_000
    config.train.accumulation_steps = 4
    config.metrics.every_steps = 10
    config.evaluate.every_steps = 1000
    config.evaluate.max_batches = 100
    config.evaluate.sample_tokens = 200
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
