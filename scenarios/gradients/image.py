"""What every image scenario is asked: its knobs, and the scenario they make."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict, TypeVar, Unpack, get_type_hints

from fedtap.attackers import parse
from fedtap.scenarios.command.options import Knob
from fedtap.simulator.defences.notation import described, written
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import AUXILIARY_AT, CLASSES, LABELS, SOURCES, Scenario
from fedtap.simulator.wire.threat_models import THREAT_MODELS


class ImageKnobs(TypedDict):
    """The knobs that all image scenarios share."""

    dataset: Annotated[str, Knob("photos, cifar10, a folder or zip of images, or an .npz", path=True)]
    size: Annotated[int, Knob("pixels a side that photos and the images of a folder or zip are brought to", 8, 512)]
    model: Annotated[str, Knob("mlp, lenet, convnet, resnet20, vit, or module:function of your own")]
    attack: Annotated[str, Knob("NAME[,NAME…], each with settings if need be: idlg(steps=300)", swept=False)]
    victims: Annotated[int, Knob("how many clients' answers are attacked", 1)]
    batch: Annotated[int, Knob("private images in each local step", 1)]
    clients: Annotated[int, Knob("honest clients beside the compromised one; 0: as many as nodes, or one a victim", 0)]
    repeats: Annotated[int, Knob("rounds in which a victim sends the same batch at the same weights, for a mean", 1)]
    local_steps: Annotated[int, Knob("local steps of SGD before a client answers", 1)]
    learning_rate: Annotated[float, Knob("learning rate of the clients' SGD", 1e-6, 1e3)]
    rounds: Annotated[int, Knob("rounds of training before the attacked ones", 0)]
    training_batch: Annotated[int, Knob("private images in each local step of those rounds; 0: as in the others", 0)]
    alpha: Annotated[float, Knob("Dirichlet concentration of classes in clients' training data; 0: IID", 0.0, 1e6)]
    defence: Annotated[str, Knob("none, or what `fedtap list` names, joined by +: clip(1.0)+noise(0.01)")]
    threat_model: Annotated[str, Knob("who listens", choices=tuple(THREAT_MODELS))]
    seed: Annotated[int, Knob("seed of all that is drawn, but for the weights", 0, 2**31)]
    weights_seed: Annotated[int, Knob("seed of the model's initial weights", 0, 2**31)]
    weights: Annotated[str, Knob(".safetensors of initial weights, in the place of the seed's", path=True, swept=False)]
    trained_attack: Annotated[
        str, Knob("PATH of a trained attack's .safetensors, as a run leaves it", path=True, swept=False)
    ]
    pairs: Annotated[
        int, Knob("auxiliary pairs for attacks that learn; 0: the public images and their mirrors, 10,000 at most", 0)
    ]
    auxiliary_source: Annotated[str, Knob("who computes the auxiliary pairs' gradients", choices=SOURCES)]
    auxiliary_classes: Annotated[str, Knob("classes of the practice examples, or a half of them", choices=CLASSES)]
    auxiliary_labels: Annotated[str, Knob("what the adversary calls its practice examples", choices=LABELS)]
    target_dataset: Annotated[str, Knob("where the victims' images are from, if from another dataset", path=True)]
    target_classes: Annotated[str, Knob("classes of the victims' images, or a half of them", choices=CLASSES)]
    auxiliary_trainings: Annotated[int, Knob("trainings of the compromised client, to practise along; 0: none", 0)]
    auxiliary_at: Annotated[
        str, Knob("when: at the weights in force, or at those before any training", choices=AUXILIARY_AT)
    ]
    local_samples: Annotated[int, Knob("images of its own that a victim trains on before it shares a gradient", 0)]
    local_epochs: Annotated[int, Knob("times that it trains on all of them", 1)]
    auxiliary: Annotated[
        str, Knob("folder of a saved practice, used if it is there and made if not", path=True, made=True, swept=False)
    ]


DEFAULTS: dict[str, Any] = {"attack": "", "trained_attack": ""} | {
    field.name: field.default for field in dataclasses.fields(Scenario) if field.name in ImageKnobs.__annotations__
}
"""A Scenario's own; no attack means those that the scenario is about."""

Function = TypeVar("Function", bound=Callable[..., Any])


def image_knobs(**defaults: Any) -> Callable[[Function], Function]:
    """Give a scenario's function the signature of its own knobs and the image knobs, with these defaults.

    A tuple is swept.
    """

    def with_signature(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        own = {
            name: hints[name]
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        knobs = own | get_type_hints(ImageKnobs, include_extras=True)
        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=(DEFAULTS | defaults)[name], annotation=hint
            )
            for name, hint in knobs.items()
        ]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function

    return with_signature


def image_scenario(**knobs: Unpack[ImageKnobs]) -> Scenario:
    """The scenario these knobs describe; plan() gives it its name and question."""
    knobs["defence"] = written(described(knobs["defence"]))  # one spelling, for all who read it
    settings: dict[str, Any] = {name: knobs[name] for name in DEFAULTS if name not in ("attack", "trained_attack")}  # type: ignore[literal-required]
    return Scenario(attacks=parse(attacks_named(knobs)), **settings)


def attacks_named(knobs: ImageKnobs) -> str:
    """The attacks that the knobs name; none where they leave it to the scenario."""
    return with_trained(knobs["attack"], knobs["trained_attack"])


def with_trained(attack: str, trained_attack: str) -> str:
    """Attacks as written for `--attack`, and the trained one at the path `trained_attack` if there is one."""
    return ",".join(filter(None, (attack, trained_attack and f"saved({trained_attack!r})")))


Delta = Annotated[float, Knob("δ at which ε is meant")]
SuccessDb = Annotated[float, Knob("PSNR from which an image is a success; 0: a recognisable one is", 0.0, 100.0)]


def promising(knobs: ImageKnobs, attack: str, delta: float, success_db: float) -> Scenario:
    """The scenario, with rows that say what its defence promises; `attack` where the knobs name none."""
    knobs["attack"], knobs["trained_attack"] = attacks_named(knobs) or attack, ""
    return dataclasses.replace(image_scenario(**knobs), delta=delta, success_db=success_db)


def heard_by(knobs: ImageKnobs, panels: Mapping[str, str]) -> tuple[Scenario, ...]:
    """A part for each listener, with its panel; the knobs may choose the listener, the attacks, or both.

    Raises:
        FedtapError: the listener has no panel, and no attack is named.
    """
    named = attacks_named(knobs)
    chosen = [knobs["threat_model"]] if knobs["threat_model"] else list(panels)[: 1 if named else None]
    if not named and chosen[0] not in panels:
        raise FedtapError(
            f"This scenario has no attacks of its own for the {chosen[0]}, but for {' and '.join(panels)}: "
            "name some, --attack."
        )
    parts = []
    for threat_model in chosen:
        part = knobs.copy()
        part["threat_model"], part["attack"] = threat_model, knobs["attack"] if named else panels[threat_model]
        parts.append(image_scenario(**part))
    return tuple(parts)


def matching_and_reading(knobs: ImageKnobs, matching: str) -> tuple[Scenario, ...]:
    """The attacks that the knobs name; where they name none, `matching` on the model, and the closed form on an MLP."""
    if attacks_named(knobs):
        return (image_scenario(**knobs),)
    matched, read = knobs.copy(), knobs.copy()
    matched["attack"] = matching
    read["attack"], read["model"] = "linear", "mlp"
    return image_scenario(**matched), image_scenario(**read)
