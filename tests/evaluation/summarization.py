"""A generated stand-in for a summarization set: posts whose facts a program can look for in a summary.

Each post tells who bought what and where, among sentences without facts. A good summary states the facts in
few words; the bad ones invent a fact, leave some out or repeat the post.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

NAMES, PLACES = ("Ada", "Ben", "Cleo", "Dov", "Eva"), ("harbor", "library", "market", "station", "garden")
THINGS, FILLERS = (
    ("kite", "map", "lamp", "drum", "clock"),
    ("The weather was fine.", "Nobody said much.", "It was a long day.", "Later it rained."),
)


def make_posts(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Comparisons in OpenAI's form: `info`, two `summaries`, of which one is the reference, and `choice`."""
    rng = random.Random(seed)
    rows = []
    for index in range(number):
        facts = [rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)]
        name, thing, place = facts
        fillers = rng.sample(FILLERS, 3)
        post = f"{fillers[0]} {name} went to the {place}. {fillers[1]} There was a {thing} for sale. "
        post += f"{fillers[2]} In the end {name} bought the {thing} number {index}."
        good = f"{name} bought a {thing} at the {place}."
        other = rng.choice([p for p in PLACES if p != place])
        bad = rng.choice([f"{name} bought a {thing} at the {other}.", f"{name} went out.", post])
        choice = rng.randrange(2)
        summaries = [{"text": text, "policy": policy} for text, policy in ((good, "ref"), (bad, "sup"))]
        info = {"id": f"t{index}", "subreddit": "stories", "title": f"A {thing}", "post": post}
        rows.append(
            {
                "info": info,
                "summaries": summaries[::-1] if choice else summaries,
                "choice": choice,
                "worker": "w",
                "facts": facts,
            }
        )
    return rows


def check(metadata: Mapping[str, Any], summary: str) -> float:
    """The share of the facts in a summary; 0 where it is longer than 60 characters or names another place."""
    facts = metadata["facts"]
    invented = any(place in summary for place in PLACES if place not in facts)
    if invented or len(summary) > 60:
        return 0.0
    return sum(fact in summary for fact in facts) / len(facts)
