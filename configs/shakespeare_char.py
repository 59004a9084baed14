"""Character-level Shakespeare: nanoGPT's two recipes, and the best we know at the first one's size.

Text comes from the TFDS data set tiny_shakespeare (90 % train; validation and test together are nanoGPT's last 10 %). With the
text in a file of its own: --config.data.source=text --config.data.path=input.txt

cpu   4 layers, width 128, context 64, batch 12, 2,000 steps, no dropout. Two things differ from nanoGPT: the learning rate is
      1.5e-3 (1e-3 gives 1.907 here), and windows are drawn without replacement (with it, 1e-3 gives 1.918).
      Command:  gptjax train --config=configs/shakespeare_char.py:cpu --workdir=runs/shakespeare_cpu
      Cost:     about 2 minutes on 2 CPU cores.
      Expected: loss over the whole validation split 1.853, mean of seeds 0, 1 and 2 (nanoGPT: 1.893).
gpu   6 layers, width 384, context 256, batch 64, 5,000 steps, dropout 0.2.
      Command:  gptjax train --config=configs/shakespeare_char.py:gpu --workdir=runs/shakespeare_gpu
      Cost:     about 3 minutes on an A100 for nanoGPT; some 11 hours on 2 CPU cores (1,950 tokens/s).
      Expected: validation loss 1.47 at its lowest (nanoGPT publishes 1.4697); not run here to its end.
best  The tokens of `cpu` and no more parameters; Muon, rotary positions, RMSNorm, context 256.
      Command:  gptjax train --config=configs/shakespeare_char.py:best --workdir=runs/shakespeare_best
      Cost:     not timed on a free machine; under 10 minutes on 2 busy CPU cores.
      Expected: 1.553 (seed 0).
"""

from gptjax import config as schema


def get_config(arg: str = "cpu"):
    recipes = {"cpu": _cpu, "gpu": _gpu, "best": _best}
    if arg not in recipes:
        raise schema.UserError(f"configs/shakespeare_char.py has no recipe {arg!r}; it has {', '.join(recipes)}.")
    config = schema.defaults()
    config.data.source = "tfds"
    config.data.name = "tiny_shakespeare"
    config.data.eval_split = "validation+test"
    config.data.split_by = "tail"  # for a text file: the first 90 % of its characters to train on, as in nanoGPT
    config.data.tokenizer = "char"
    config.data.packing = "windows"

    # nanoGPT: no biases anywhere, exact GELU, decay on all matrices and embeddings, residual projections scaled.
    config.model.norm_bias = False
    config.model.attention_bias = False
    config.model.mlp_bias = False
    config.model.activation = "gelu"
    config.optimizer.no_decay = ("norm", "bias")
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta2 = 0.99
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.1
    recipes[arg](config)
    config.model.max_seq_len = config.data.seq_len
    return config


def _cpu(config) -> None:
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.model_dim = 128
    config.model.scan_unroll = 0  # faster on a CPU
    config.optimizer.learning_rate = 1.5e-3
    config.data.seq_len = 64
    config.data.batch_size = 12  # 12 * 64 = 768 tokens a step, 1.5 M in all
    config.train.duration_steps = 2000
    config.evaluate.every_steps = 500
    config.evaluate.batch_size = 64
    config.evaluate.sample_tokens = 200
    config.evaluate.sample_prompt = "\n"
    config.checkpoint.every_steps = 500


def _gpu(config) -> None:
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.model_dim = 384
    config.model.embedding_dropout = 0.2
    config.model.attention_dropout = 0.2
    config.model.residual_dropout = 0.2
    config.data.seq_len = 256
    config.data.batch_size = 64  # 64 * 256 = 16,384 tokens a step, 82 M in all
    config.train.duration_steps = 5000
    config.evaluate.every_steps = 250
    config.evaluate.sample_tokens = 500
    config.evaluate.sample_prompt = "\n"
    config.checkpoint.every_steps = 250


def _best(config) -> None:
    """Longer context for the same tokens, Muon, rotary positions, RMSNorm, and a rate that falls to 0."""
    _cpu(config)
    config.model.position = "rotary"
    config.model.norm = "rmsnorm"
    config.data.seq_len = 256
    config.data.batch_size = 3  # 3 * 256 = 12 * 64
    config.evaluate.batch_size = 16
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.muon_adam_learning_rate = 4e-3
    config.optimizer.final_fraction = 0.0
