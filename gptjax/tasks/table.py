"""All kinds of tasks, by `task.kind`."""

from gptjax.tasks.base import Task
from gptjax.tasks.classification import Classification
from gptjax.tasks.completion import Completion

TASKS: dict[str, Task] = {
    "classification": Classification(),
    "completion": Completion(),
}
