"""Two tasks of one's own, and a name for both."""

from itertools import product

from orchestrator.evaluation.tasks import EvaluationTask, TaskGroup


class Addition(EvaluationTask):
    """Which number is the sum? Four choices."""

    sign, word = 1, "plus"

    def config(self):
        return {
            "output_type": "multiple_choice",
            "doc_to_text": "{{a}} {{word}} {{b}} is",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }

    def items(self):
        return [self.item(a, b) for a, b in product(range(5, 15), range(5)) if (a + b) % 7]

    def examples(self):
        return [self.item(a, b) for a, b in product(range(5, 15), range(5)) if (a + b) % 7 == 0]

    def item(self, a, b):
        result, label = a + self.sign * b, (a * b) % 4
        choices = [str(result + i - label) for i in range(4)]
        return {"a": a, "b": b, "word": self.word, "choices": choices, "label": label}


class Subtraction(Addition):
    """Which number is the difference?"""

    sign, word = -1, "minus"


class Arithmetic(TaskGroup):
    """Both tasks."""

    names = ("addition", "subtraction")
