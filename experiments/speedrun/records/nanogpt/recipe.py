"""nanoGPT's recipe for a CPU, with the learning rate at which it meets the target here: see README.md."""

from gptjax import config as schema


def get_config():
    config = schema.defaults()
    config.data.packing = "windows"
    config.data.seq_len = 64
    config.data.batch_size = 12
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.model_dim = 128
    config.model.max_seq_len = 64
    config.model.norm_bias = False
    config.model.attention_bias = False
    config.model.mlp_bias = False
    config.model.activation = "gelu"
    config.model.scan_unroll = 0
    config.optimizer.no_decay = ("norm", "bias")
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.beta2 = 0.99
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.1
    config.train.duration_steps = 2000
    config.evaluate.batch_size = 64
    return config
