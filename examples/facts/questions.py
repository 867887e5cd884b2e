"""The questions of the lm-eval task `facts`; the first choice is right."""

from __future__ import annotations

from typing import Any

import datasets

QUESTIONS = [
    ("What is the capital of France?", "Paris", "Lyon", "Madrid", "Rome"),
    ("What is the capital of Japan?", "Tokyo", "Seoul", "Beijing", "Osaka"),
    ("What is the capital of Italy?", "Rome", "Milan", "Paris", "Athens"),
    ("What is the capital of Egypt?", "Cairo", "Tunis", "Nairobi", "Baghdad"),
    ("What is the capital of Canada?", "Ottawa", "Toronto", "Montreal", "Vancouver"),
    ("What is the capital of Australia?", "Canberra", "Sydney", "Melbourne", "Perth"),
    ("What is the capital of Norway?", "Oslo", "Stockholm", "Copenhagen", "Helsinki"),
    ("What is the capital of Kenya?", "Nairobi", "Kampala", "Lagos", "Accra"),
    ("Which planet is closest to the Sun?", "Mercury", "Venus", "Earth", "Jupiter"),
    ("Which planet is known for its rings?", "Saturn", "Mars", "Mercury", "Venus"),
    ("Which planet is called the red planet?", "Mars", "Neptune", "Saturn", "Venus"),
    ("What does the Earth orbit?", "the Sun", "the Moon", "Mars", "Jupiter"),
    ("What is frozen water called?", "ice", "steam", "oil", "salt"),
    ("Which gas do plants take in?", "carbon dioxide", "helium", "neon", "argon"),
    ("Which gas do people need to breathe?", "oxygen", "helium", "neon", "hydrogen"),
    ("Which metal is liquid at room temperature?", "mercury", "iron", "gold", "copper"),
    ("What is the chemical symbol of gold?", "Au", "Fe", "Pb", "Na"),
    ("How many legs does a spider have?", "eight", "six", "four", "ten"),
    ("How many legs does an insect have?", "six", "eight", "four", "two"),
    ("How many days are in a week?", "seven", "five", "six", "ten"),
    ("How many months are in a year?", "twelve", "ten", "seven", "thirty"),
    ("How many sides does a triangle have?", "three", "four", "five", "six"),
    ("What do bees make?", "honey", "milk", "silk", "cheese"),
    ("What is a young dog called?", "puppy", "kitten", "calf", "foal"),
    ("What is a young cat called?", "kitten", "puppy", "calf", "chick"),
    ("Which animal says moo?", "cow", "duck", "cat", "frog"),
    ("Which is the largest animal?", "blue whale", "elephant", "giraffe", "horse"),
    ("Who wrote Hamlet?", "William Shakespeare", "Charles Dickens", "Mark Twain", "Homer"),
    ("Who developed the theory of relativity?", "Albert Einstein", "Plato", "Mozart", "Homer"),
    ("In which continent is Brazil?", "South America", "Europe", "Africa", "Asia"),
    ("In which continent is Nigeria?", "Africa", "Asia", "Europe", "South America"),
    ("Which language is spoken in Mexico?", "Spanish", "German", "Chinese", "Russian"),
]


def read(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the questions as the split `test`; lm-eval calls this."""
    rows = [{"question": question, "choices": choices} for question, *choices in QUESTIONS]
    return {"test": datasets.Dataset.from_list(rows)}
