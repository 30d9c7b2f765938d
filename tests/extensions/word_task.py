"""A task: problems of a split and a reward."""

from forerun.config import TaskConfig
from forerun.tasks import Problem, Task


def build(config: TaskConfig, seed: int) -> Task:
    """Digits to repeat; every digit of the answer is worth 0.1."""

    def problems(split: str) -> list[Problem]:
        first = 0 if split == "train" else 900
        return [Problem(f"{split}/{i}", f"say {i}", str(i)) for i in range(first, first + config.size)]

    def reward(problem: Problem, completion: str) -> float:
        return 0.1 * sum(completion.count(digit) for digit in problem.answer)

    return Task("words", problems, reward)
