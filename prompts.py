"""The fixed prompts that teacher and student complete side by side.

PROMPTS is what evaluate.py uses; a run samples the first IN_RUN of them as it goes.
"""

IN_RUN = 3
PROMPTS = (
    "The capital of France is",
    "To open a file for reading in Python, call",
    "def factorial(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils when",
    "The three primary colours are",
    "Question: How many days are there in a leap year?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The main difference between a list and a tuple is",
    "1, 1, 2, 3, 5, 8,",
    "English: good morning\nFrench: bonjour\nEnglish: thank you\nFrench:",
    "Photosynthesis is the process by which",
    "She looked at the letter for a long time before she",
    "Ingredients: flour, butter, sugar, two eggs.\nMethod: First,",
    "In 1969, for the first time, a human being",
    "import math\n\ndef area_of_circle(radius):\n",
    "Tom is taller than Ann, and Ann is taller than Sue. The shortest of them is",
    "The most important lesson that I have learned is",
    "<ul>\n  <li>Apples</li>\n  <li>Pears</li>\n",
    "To be, or not to be, that is",
)
