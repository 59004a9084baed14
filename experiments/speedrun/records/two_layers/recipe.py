"""Two layers, cosine attention and Muon, for under a quarter of the tokens of nanoGPT's recipe: see README.md."""

from gptjax import config as schema


def get_config():
    config = schema.defaults()
    config.data.packing = "windows"
    config.data.seq_len = 48
    config.data.batch_size = 20  # 48 * 20 = 960 tokens a step, 345,600 in all
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.model_dim = 128
    config.model.max_seq_len = 48
    config.model.norm = "rmsnorm"
    config.model.position = "rotary"
    config.model.attention_score = "cosine"
    config.model.attention_bias = False
    config.model.mlp_bias = False
    config.model.activation = "relu2"
    config.model.scan_unroll = 0
    config.optimizer.name = "muon"
    config.optimizer.no_decay = ("norm", "bias")
    config.optimizer.learning_rate = 0.04
    config.optimizer.muon_adam_learning_rate = 0.04
    config.optimizer.beta1 = 0.85
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 0
    config.optimizer.final_fraction = 0.0
    config.train.duration_steps = 360
    config.evaluate.every_steps = 0
    config.evaluate.batch_size = 32
    return config
