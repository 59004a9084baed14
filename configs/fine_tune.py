"""Tasks for the small GPT of configs/small_gpt.py, one recipe each: from a text's label to a conversation.

sms_spam, movie_reviews, subjectivity, csl   a label of a text (spam; opinion; opinion or fact; the field of a Chinese paper)
slots                                        tags of words, CoNLL format: the names, areas, ... in descriptions of restaurants
xquad_en, xquad_zh                           the part of a paragraph that answers a question
e2e                                          a description of a restaurant from what is to be said of it
dialogue                                     the assistant's turns of conversations

Command:  python experiments/fine_tuning/prepare.py --data=DIR --out=runs/fine_tuning/data
          gptjax train --config=configs/small_gpt.py --workdir=runs/small_gpt
          gptjax train --config=configs/fine_tune.py:sms_spam --workdir=runs/sms_spam
          gptjax evaluate runs/sms_spam
Cost:     2 to 7 minutes a run on one CPU core with other work beside.
Expected: spam F1 0.963, subjectivity 0.917, CSL 0.727, slots F1 0.962, E2E BLEU 44.7; all of it, beside baselines, in
          experiments/fine_tuning/README.md.
"""

from gptjax import config as schema

# Steps, rows of a step, tokens of a row, and how the records are to be read.
LABELS = {
    "sms_spam": (300, 16, 64),
    "movie_reviews": (150, 8, 512),  # the first 512 tokens of a review
    "subjectivity": (500, 16, 64),
    "csl": (500, 16, 64),
}


def get_config(arg: str = "sms_spam"):
    tasks = {**dict.fromkeys(LABELS, _labels), "slots": _slots, "xquad_en": _answers, "xquad_zh": _answers, "e2e": _e2e}
    tasks["dialogue"] = _dialogue
    if arg not in tasks:
        raise schema.UserError(f"configs/fine_tune.py has no task {arg!r}; it has {', '.join(tasks)}.")
    config = schema.defaults()
    config.init_from = "runs/small_gpt"
    config.init_model = True
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.metrics.every_steps = 10
    config.evaluate.every_steps = 100
    config.evaluate.max_batches = 10
    config.checkpoint.every_steps = 100
    tasks[arg](config, arg)
    return config


def _files(config, name: str, ending: str) -> None:
    config.task.path = f"runs/fine_tuning/data/{name}_train.{ending}"
    config.task.eval_path = f"runs/fine_tuning/data/{name}_test.{ending}"


def _shape(config, steps: int, rows: int, tokens: int) -> None:
    config.train.duration_steps, config.data.batch_size, config.data.seq_len = steps, rows, tokens


def _labels(config, name: str) -> None:
    config.task.kind = "classification"
    _files(config, name, "jsonl")
    _shape(config, *LABELS[name])


def _slots(config, name: str) -> None:
    config.task.kind = "tagging"
    _files(config, name, "conll")
    _shape(config, 300, 16, 128)


def _answers(config, name: str) -> None:
    config.task.kind = "answers"
    config.task.normaliser = "mlqa-zh" if name.endswith("zh") else "squad"
    config.task.overlap = 0.5
    _files(config, name, "json")
    config.task.format = "squad"
    _shape(config, 100, 16, 256)


def _e2e(config, name: str) -> None:
    config.task.kind = "completion"
    config.task.prompt = "{meaning}\n"
    config.task.completion = "{texts}"
    config.task.measures = ("bleu", "rouge", "chrf")
    config.task.generate_records = 300
    config.task.max_new_tokens = 80
    _files(config, name, "jsonl")
    _shape(config, 250, 16, 128)


def _dialogue(config, name: str) -> None:
    config.task.kind = "chat"
    config.task.chat_template = "plain"
    _files(config, name, "jsonl")
    _shape(config, 150, 16, 128)
