"""All kinds of tasks, by `task.kind`."""

from gptjax.tasks.answers import Answers
from gptjax.tasks.base import Task
from gptjax.tasks.chat import Chat
from gptjax.tasks.classification import Classification
from gptjax.tasks.completion import Completion
from gptjax.tasks.multilabel import Multilabel
from gptjax.tasks.preference import Preference
from gptjax.tasks.regression import Regression
from gptjax.tasks.tagging import Tagging

TASKS: dict[str, Task] = {
    "classification": Classification(),
    "multilabel": Multilabel(),
    "regression": Regression(),
    "tagging": Tagging(),
    "answers": Answers(),
    "completion": Completion(),
    "chat": Chat(),
    "preference": Preference(),
}
