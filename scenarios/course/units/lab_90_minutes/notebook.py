# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What a gradient gives away: a lab of 90 minutes
#
# For a guest lecture: one exercise from each of the units 1 to 3, and a picture of your own.

# %%
import os

import matplotlib.pyplot as plt
import torch

import fedtap
from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in

STUDENT = "Ada Lovelace"
STEPS = 10 if os.environ.get("FEDTAP_COURSE_QUICK") else 120

# %% [markdown]
# ## 0 to 25 minutes: one picture, one gradient
#
# A client sent the gradient of one photograph. Let an attack match it, and look.

# %%
first = given(1, STUDENT)
leak = first["dlg"]["leak"]
found = fedtap.attack(leak, f"idlg(steps={STEPS})").images[0, 0]
plt.imshow(found.permute(1, 2, 0))
plt.savefig("came_back.png")
rows = hand_in(1, STUDENT, {"dlg": found, "pixels": None}, "answers_1.json")["exercises"]
print(*(row["hint"] for row in rows if row["name"] == "dlg"))

# %% [markdown]
# Now without a computer: exercise 1 of unit 1. Read six pixels off ∂L/∂W and ∂L/∂b.

# %%
print(first["pixels"])

# %% [markdown]
# ## 25 to 55 minutes: when it stops
#
# The collusion puzzle of unit 2: two means, one missing client.

# %%
second = given(2, STUDENT)
print(second["collusion"])
collusion = None  # four numbers
print(hand_in(2, STUDENT, {"collusion": collusion}, "answers_2.json")["exercises"][1]["hint"])

# %% [markdown]
# ## 55 to 85 minutes: noise
#
# Change σ and look at the picture: below which σ do you still see what it is? Then play the attacker of unit 3 by
# hand.

# %%
from fedtap.simulator.defences.chained import parse

sent = {name: tensor[0] for name, tensor in leak.observed.items()}
figure, axes = plt.subplots(1, 4)
for axis, sigma in zip(axes, (0.0, 0.001, 0.01, 0.1), strict=True):
    noised = parse(f"noise({sigma})").update(sent, torch.Generator().manual_seed(0))
    seen = fedtap.attack(
        fedtap.leak(first["dlg"]["model"], noised, shape=leak.protocol.shape, defence=f"noise({sigma})"),
        f"idlg(steps={STEPS})",
    )
    axis.imshow(seen.images[0, 0].permute(1, 2, 0))
    axis.set_title(f"σ = {sigma:g}")
    axis.axis("off")
figure.savefig("noise.png")

# %%
third = given(3, STUDENT)
print(third["attacker"])
print(hand_in(3, STUDENT, {"attacker": None}, "answers_3.json")["exercises"][0]["hint"])

# %% [markdown]
# ## Which of these did the client send?
#
# A client has one of four photographs and sends its gradient with noise. Look at what an attack makes of it (left),
# and write down your guess, 0 to 3. Then the attacker, who has the four photographs too, takes the one whose own
# gradient is nearest to what was sent. Run the three cells several times and keep the score. At which σ are you no
# better than chance, and at which is the attacker?

# %%
from fedtap.scenarios.course.pictures import client_gradient, course_photos

sigma = 0.02
model, photographs = first["dlg"]["model"], course_photos().target
images, labels = photographs.batch(torch.randperm(len(photographs))[:4])
secret = int(torch.randint(4, ()))
gradients = [client_gradient(model, images[n : n + 1], labels[n : n + 1]) for n in range(4)]
reply = {name: part + sigma * torch.randn_like(part) for name, part in gradients[secret].items()}
leak = fedtap.leak(model, reply, shape=tuple(images.shape[1:]), defence=f"noise({sigma})")
figure, axes = plt.subplots(1, 5)
for axis, picture in zip(axes, [fedtap.attack(leak, f"idlg(steps={STEPS})").images[0, 0], *images], strict=True):
    axis.imshow(picture.permute(1, 2, 0))
    axis.axis("off")
figure.savefig("which.png")

# %%
guess = 0  # yours

# %%
apart = [sum(float((reply[name] - part).square().sum()) for name, part in one.items()) for one in gradients]
print(f"you: {guess == secret}, the attacker: {apart.index(min(apart)) == secret}")

# %% [markdown]
# ## 85 to 90 minutes: your own photograph
#
# `fedtap run first_leak --dataset FOLDER --attack idlg`, with a folder of three photographs that are your own, on
# your own laptop. Nothing leaves it.
