"""A small GPT to fine-tune: reviews, messages, dialogues, paper titles, encyclopedia paragraphs, in English and Chinese.

Command:  python experiments/fine_tuning/prepare.py --data=DIR --out=runs/fine_tuning/data
          gptjax train --config=configs/small_gpt.py --workdir=runs/small_gpt
Cost:     30 minutes on 2 CPU cores with other work beside.
Expected: loss 4.226 a token, 1.664 bits per byte (seed 0).
"""

from gptjax import config as schema


def get_config(arg: str = ""):
    config = schema.defaults()
    config.data.source = "jsonl"
    config.data.path = "runs/fine_tuning/data/pretrain.jsonl"
    config.data.tokenizer = "sentencepiece"  # trained on the text, once
    config.data.tokenizer_vocab_size = 8000
    config.data.seq_len = 256
    config.data.batch_size = 16  # 16 * 256 = 4,096 tokens a step
    config.data.eval_fraction = 0.02

    config.model.num_layers = 4
    config.model.model_dim = 192
    config.model.num_heads = 6
    config.model.max_seq_len = 512  # rotary positions: tasks may have longer texts
    config.model.position = "rotary"
    config.model.norm = "rmsnorm"
    config.model.scan_unroll = 0  # faster on a CPU

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.muon_adam_learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.0

    config.train.duration_steps = 800
    config.metrics.every_steps = 10
    config.evaluate.every_steps = 200
    config.evaluate.max_batches = 20
    config.evaluate.sample_prompt = "This film"
    config.evaluate.sample_tokens = 60
    config.checkpoint.every_steps = 200
    return config
