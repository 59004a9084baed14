"""All kinds of tasks, by `task.kind`."""

from gptjax.tasks.base import Task
from gptjax.tasks.chat import Chat
from gptjax.tasks.classification import Classification
from gptjax.tasks.completion import Completion
from gptjax.tasks.preference import Preference

TASKS: dict[str, Task] = {
    "classification": Classification(),
    "completion": Completion(),
    "chat": Chat(),
    "preference": Preference(),
}
