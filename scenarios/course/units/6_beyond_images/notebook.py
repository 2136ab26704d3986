# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 6: Beyond images
#
# A client may send the gradient of a language model, a posterior, activations or a tuned model. Every message is a
# leak, and the same question is asked of each: what follows from it about the private data?

# %%
from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in

STUDENT = "Ada Lovelace"
mine = given(6, STUDENT)
answers = {}

# %% [markdown]
# ## 1. Eight headlines (30 minutes)
#
# A client took one step on eight texts of eight words, with a small GPT whose embeddings are frozen. The rows of the
# gradient of a query projection span what the projection was fed. How many tokens are in the batch, and how wide is
# the model? Find the attack that reads texts, and turn token numbers into words.

# %%
leak, vocabulary = mine["tokens"]["leak"], mine["tokens"]["vocabulary"]
print(leak.protocol, len(vocabulary), vocabulary[:6])
answers["tokens"] = None  # eight texts

# %% [markdown]
# ## 2. Sufficient statistics (30 minutes)
#
# A client fitted y = a + b x + N(0, σ²) to its records, by Bayes with a flat prior, and sends the covariance of (a,
# b) alone. How many records has it, and what are the mean and the variance of x?

# %%
print(mine["statistics"])
answers["statistics"] = {"records": None, "mean": None, "variance": None}

# %% [markdown]
# ## 3. Audit five apps (30 minutes)
#
# Of each app you have seen one exchange: the weights before, the reply, and what the client held. Its model is
# linear, with the loss ½ (x · w - y)², mean over the records. Give each app one of the verdicts of `fedtap audit`. An
# update here is of five local steps.

# %%
print(mine["audit"]["verdicts"], mine["audit"]["learning_rate"])
for app, seen in mine["audit"]["apps"].items():
    print(app, {name: tuple(tensor.shape) for name, tensor in seen.items()}, seen["reply"][:3])
answers["audit"] = dict.fromkeys(mine["audit"]["apps"])

# %% [markdown]
# ## Hand in

# %%
for row in hand_in(6, STUDENT, answers)["exercises"]:
    print(f"{row['name']}: {row['score']:.0%}  {row['hint']}")
