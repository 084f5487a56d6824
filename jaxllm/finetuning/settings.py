"""What a training is asked to do, and the optimizer that this asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from jaxllm.errors import InputError
from jaxllm.finetuning.data import TooLong

if TYPE_CHECKING:
    import optax

SCHEDULES = "cosine", "linear", "constant"
TOO_LONG = "refuse", "cut", "skip"
# The smallest value of each number.
LEAST = {
    "rank": 1, "epochs": 1, "steps": 1, "batch": 1, "accumulate": 1, "length": 2, "learning_rate": 0.0, "warmup": 0.0,
    "weight_decay": 0.0, "clip": 0.0, "held_out": 0, "evaluate_every": 1, "save_every": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A training.

    Attributes:
        rank: of the changes.
        alpha: what is added is `alpha / rank * b @ a`; None: twice the rank.
        targets: the last parts of the names of the matrices that are changed, such as "q_proj", or "experts.down_proj"
            for stacks of experts; None: every projection of attention and of feed-forward blocks, but no stacks.
        epochs: how often the examples are seen.
        steps: how many steps there are, whatever `epochs` says.
        batch: rows that are processed together.
        accumulate: batches whose gradients are added up to one step.
        length: tokens of a row; None: as many as the longest example has.
        too_long: what happens to examples longer than that: "refuse" stops, "cut" keeps their beginning, "skip" leaves
            them out.
        learning_rate: the highest.
        schedule: how it falls after the warmup: "cosine" or "linear" to zero, or "constant".
        warmup: the part of all steps in which it rises from zero.
        weight_decay: of AdamW.
        clip: the largest norm of the gradient; larger ones are scaled down to it. 0: any.
        remat: whether what is inside a layer is computed again in the backward pass, instead of kept: less memory, more
            time.
        held_out: how many examples are not trained on but evaluated; drawn with the seed.
        evaluate_every: steps between evaluations; None: one after every epoch.
        save_every: steps between checkpoints.
        seed: of the order of examples, of those that are held out, and of the factors that training begins with.
    """

    rank: int = 16
    alpha: float | None = None
    targets: Sequence[str] | None = None
    epochs: int = 1
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    length: int | None = None
    too_long: TooLong = "refuse"
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    remat: bool = False
    held_out: int = 0
    evaluate_every: int | None = None
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name in LEAST and value is not None and not value >= LEAST[field.name]:
                raise InputError(f"{field.name} {value}: must be {LEAST[field.name]} or above")
        if not self.warmup <= 1:
            raise InputError(f"warmup {self.warmup}: it is a part of all steps, so 1 at most")
        for name, value, choices in (("schedule", self.schedule, SCHEDULES), ("too_long", self.too_long, TOO_LONG)):
            if value not in choices:
                raise InputError(f"{name} '{value}': choose one of {', '.join(choices)}")

    @property
    def scale(self) -> float:
        """What `b @ a` is multiplied by."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def optimizer(self, steps: int) -> "optax.GradientTransformation":
        """AdamW (Loshchilov and Hutter, 2019) with clipping and a schedule for this many steps."""
        import optax  # the command line lists its options without it

        rising, peak = round(self.warmup * steps), self.learning_rate
        falling = {
            "cosine": optax.cosine_decay_schedule(peak, max(steps - rising, 1)),
            "linear": optax.linear_schedule(peak, 0.0, max(steps - rising, 1)),
            "constant": optax.constant_schedule(peak),
        }[self.schedule]
        rate = optax.join_schedules([optax.linear_schedule(0.0, peak, max(rising, 1)), falling], [rising])
        clipping = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        return optax.chain(*clipping, optax.adamw(rate, weight_decay=self.weight_decay))


class SettingsOptions(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments, for type checkers."""

    rank: int
    alpha: float | None
    targets: Sequence[str] | None
    epochs: int
    steps: int | None
    batch: int
    accumulate: int
    length: int | None
    too_long: TooLong
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip: float
    remat: bool
    held_out: int
    evaluate_every: int | None
    save_every: int
    seed: int
