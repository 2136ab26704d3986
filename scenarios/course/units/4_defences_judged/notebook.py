# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 4: Defences and adaptive attackers
#
# A defence is announced to everybody who takes part, so the attacker knows it. A test against an attack that does not
# know it says nothing. In this unit you break a defence, and then write one.

# %%
import os

import fedtap
from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in

STUDENT = "Ada Lovelace"
STEPS = 5 if os.environ.get("FEDTAP_COURSE_QUICK") else 40
mine = given(4, STUDENT)
answers = {}

# %% [markdown]
# ## 1. Break `sign()` (40 minutes)
#
# The client sends the sign of each entry of its gradient. An attack that compares its own gradient with signs fails,
# and the defence looks good. What would you compare instead? fedtap's attacks have a field for it; `fedtap list`
# shows them. Your picture counts if it is better than the plain attack's and shows what is on it.

# %%
leak = mine["break_sign"]["leak"]
plain = fedtap.attack(leak, f"idlg(steps={STEPS})").images[0, 0]
print(leak.protocol.defence, f"mean pixel of the plain attack's picture: {float(plain.mean()):.2f}")
answers["break_sign"] = None  # a picture

# %% [markdown]
# ## 2. Add a defence (40 minutes)
#
# Sparse ternary compression (Sattler et al. 2019) keeps the k largest entries of each tensor and sends of each its
# sign, times the mean size of the entries that are kept; all others are sent as 0. Write it. Then answer what fedtap
# asks of every defence (`fedtap.simulator.defences.defence`): how long can what is sent be if the gradient has norm
# `norm`, and which ε does it guarantee?
#
# Below is a defence of fedtap whose `stacked` sends everything as it is, and two of whose answers are wrong for
# yours. `broken_rules` holds it against the contract. The project's own tests, `pytest tests/simulator/defences`, ask
# more: they find a file in `simulator/defences/` by themselves.

# %%
from dataclasses import dataclass
from typing import Annotated

from fedtap.scenarios.course.conformance import broken_rules
from fedtap.simulator.defences.defence import EVERYTHING, Range, Replay, UpdateDefence, unchanged


@dataclass(frozen=True, repr=False)
class Ternary(UpdateDefence):
    """Signs of the k largest entries of each tensor, at their mean size. https://arxiv.org/abs/1903.02891"""

    k: Annotated[int, Range(1, ends=(True, False))]

    survives = EVERYTHING  # what of a plain gradient can still be seen?

    def stacked(self, gradients, draws):
        return {name: tensor.clone() for name, tensor in gradients.items()}

    def error(self, batch):
        return None  # nothing is random

    def replay(self, exchange):
        return Replay(unchanged, exact=False, prior=1e-3)

    def averaged(self, times):
        return self

    def bound(self, norm):
        return float("inf")

    def release(self, clip, adjacency, releases, steps):
        return None  # no noise, no ε

    def check(self, network, shape):
        """It fits every network."""


told = mine["defence"]
print(told)
print(broken_rules(Ternary(told["k"])))
answers["defence"] = {"sent": Ternary(told["k"])(told["gradient"], None), "bound": None, "epsilon": None}

# %% [markdown]
# ## Hand in

# %%
for row in hand_in(4, STUDENT, answers)["exercises"]:
    print(f"{row['name']}: {row['score']:.0%}  {row['hint']}")
