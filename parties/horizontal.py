"""`[horizontal]` of the agreement: what parties that hold the same columns for different rows agree on.

Values that contradict each other are refused here, before any data is read, with the reason.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
MOST_CATEGORIES = 10_000  # of a column
Words = Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=MOST_CATEGORIES)]

AVERAGING = ("fedsgd", "fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedprox")


class Clients(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who is asked in a round and when it closes.

    fraction, minimum: of the clients asked each round, chosen at random, by their rows or by their speed; or each drawn
    by itself with chance `fraction`, in secret ("poisson"), which makes privacy cheaper. quorum: the least number in a
    sum (0: a majority of those asked; of those drawn by chance nobody need come). deadline: seconds for training, then
    for each step of the sum; attempts: how often a sum is tried. minimum_rows, minimum_classes: a client with fewer is
    refused.
    """

    fraction: Fraction = 1.0
    minimum: Count = 1
    quorum: Whole = 0
    deadline: Positive = 60.0
    selection: Literal["random", "rows", "speed", "poisson"] = "random"
    attempts: Count = 3
    minimum_rows: Whole = 0
    minimum_classes: Whole = 0

    @property
    def rate(self) -> float:
        """The chance with which a client takes part in a round, where nobody sees who does; else 1."""
        return self.fraction if self.selection == "poisson" else 1.0

    @property
    def longest(self) -> float:
        """Seconds that a sum takes at the most: late clients, training, and every step of every attempt."""
        return self.deadline * (2 + 6 * self.attempts)

    def asked(self, clients: int) -> int:
        """How many of so many clients are asked in a round."""
        return min(clients, max(self.minimum, math.ceil(self.fraction * clients)))

    def needed(self, asked: int) -> int:
        """How many of those asked the sum must have."""
        return self.quorum or asked // 2 + 1


class Privacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Differential privacy of the whole job: (epsilon, delta) for one example ("record") or one client ("client").

    noise: added by the coordinator to the sum ("central"), in full by every client ("local"), or in shares under secure
    aggregation ("distributed"). clip: the L2 norm of one contribution. repeats: how many rounds may be repeated within
    epsilon. rows: a public number of rows, by which summed gradients are divided (record level).
    """

    level: Literal["none", "record", "client"] = "none"
    noise: Literal["central", "local", "distributed"] = "distributed"
    epsilon: Positive = 1.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    clip: Positive = 1.0
    repeats: Whole = 2
    rows: Whole = 0


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One array of parameters of an own model that travels, the same at all parties."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    shape: tuple[Whole, ...] = ()
    dtype: Annotated[str, Meta(pattern=r"^(float|int|uint)(8|16|32|64)$")] = "float32"


class Public(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The public table of a distillation: its rows and its digest, which `colonnade check` tells. weight: of one of its
    rows in a client's training, against one of the client's own."""

    rows: Count
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    weight: Positive = 1.0


class Horizontal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The job of parties that hold the same columns for different rows.

    model: a family with scikit-learn's `C`, `alpha` and `fit_intercept`, or "own": an object that every party brings.
    strategy: "exact" (Newton, scikit-learn's optimum) or a member of the family, with its `parameters`; epochs, batch
    (0: all rows) and rate are of the local training. classes: the labels, or none: what the clients declare.
    degree: of the graph of secure aggregation (0: complete). poisoned, norm_bound: of the robust rule. keep: the
    fraction of columns that a round trains (federated dropout). personal: a torch model's parameters that stay each
    client's own, by the beginning of their names. fine_tune: epochs after the last round that only the client keeps.
    test_fraction: of each client's rows, kept from training, on which the model is scored (0: on all rows).
    Of own models: arrays, all that travels, in order; frozen, the digest of what a torch module does not train, and its
    loss ("": cross entropy where classes are listed, squared otherwise); config, what a Flower client's code reads;
    public, the table of a distillation.
    """

    model: Literal["logistic", "linear", "poisson", "own"] = "logistic"
    strategy: Literal[
        "exact",
        "fedsgd",
        "fedavg",
        "fedavgm",
        "fedadagrad",
        "fedadam",
        "fedyogi",
        "fedprox",
        "feddyn",
        "scaffold",
        "distillation",
    ] = "exact"
    parameters: dict[str, float] = {}
    classes: tuple[int | str, ...] = ()
    C: Positive = 1.0
    alpha: NotNegative = 0.0
    fit_intercept: bool = True
    standardise: bool = False
    rounds: Count = 50
    epochs: Count = 1
    batch: Whole = 32
    rate: Positive = 0.1
    seed: Whole = 0
    test_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    clients: Clients = Clients()
    secure_aggregation: Literal["on", "none"] = "on"
    degree: Whole = 0
    compression: str = ""
    robust: Literal["mean", "norm_bound", "median", "trimmed_mean", "krum", "multi_krum"] = "mean"
    poisoned: Whole = 0
    norm_bound: NotNegative = 0.0
    keep: Fraction = 1.0
    personal: str = ""
    fine_tune: Whole = 0
    leave_one_out: bool = False
    arrays: tuple[Array, ...] = ()
    frozen: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    loss: Literal["", "cross_entropy", "squared", "poisson"] = ""
    config: dict[str, bool | int | float | str] = {}
    public: Public | None = None
    privacy: Privacy = Privacy()
    checkpoint: bool = True

    def __post_init__(self) -> None:
        for wrong, reason in self._contradictions():
            if wrong:
                raise ValueError(reason)

    @property
    def secure(self) -> bool:
        return self.secure_aggregation == "on"

    @property
    def private(self) -> bool:
        return self.privacy.level != "none"

    @property
    def listed(self) -> int:
        """Numbers of an own model that travel, as the agreement lists them: weights, or predictions."""
        if self.public is not None:
            return self.public.rows * max(len(self.classes), 1)
        return sum(math.prod(one.shape) for one in self.arrays)

    @property
    def releases(self) -> int:
        """That the agreed epsilon pays for."""
        return self.rounds + self.privacy.repeats

    def needed(self, asked: int) -> int:
        """So many clients a sum has at least, where so many are asked; under masks three: each of two could subtract
        its own part."""
        if self.clients.selection == "poisson":  # a small sample is no fault
            return 1
        return max(self.clients.needed(asked), 3 if self.secure else 1)

    def threshold(self, asked: int, invited: int, own: bool) -> int:
        """So many a secure sum has at least: a majority of the invited, else they could open two; above
        (invited + 1) / 2 where the coordinator, which holds shares then and sees all messages, is one of them."""
        return max(self.needed(asked), (invited + own) // 2 + 1)

    def _contradictions(self) -> list[tuple[object, str]]:
        exact, own, robust, noise = self.strategy == "exact", self.model == "own", self.robust, self.privacy.noise
        ruled, distils = robust != "mean", self.strategy == "distillation"
        return [
            (
                len({type(value) for value in self.classes}) > 1 or len(set(self.classes)) < len(self.classes),
                "classes are all numbers or all text, each once",
            ),
            (exact and own, 'strategy "exact" knows logistic, linear and poisson; an own model needs another'),
            (
                exact and (self.compression or ruled or self.keep < 1 or self.personal or self.private),
                'strategy "exact" needs whole sums: no compression, robust rule, dropout, personal part or privacy',
            ),
            (
                self.secure and self.compression,
                'compressed updates have no sum under masks; set secure_aggregation = "none", or no compression',
            ),
            (
                self.secure and ruled and robust != "norm_bound",
                f"robust {robust} needs each client's own update; "
                'set secure_aggregation = "none", or robust = "norm_bound"',
            ),
            (
                self.secure and self.leave_one_out,
                'leaving one out shows its update by difference; set secure_aggregation = "none", or no leave_one_out',
            ),
            (
                self.clients.selection == "poisson"
                and (
                    self.privacy.level != "client"
                    or noise != "central"
                    or self.secure
                    or self.clients.minimum > 1
                    or self.clients.quorum
                ),
                'selection = "poisson" keeps secret who is drawn: privacy level "client", noise "central", '
                'secure_aggregation = "none", no minimum and no quorum',
            ),
            (self.degree % 2, "the degree of the graph of secure aggregation is even"),
            (self.degree and not self.secure, "a degree is of secure aggregation, which is off"),
            (robust == "norm_bound" and not self.norm_bound, "robust norm_bound needs norm_bound, above 0"),
            (
                robust in ("trimmed_mean", "krum", "multi_krum") and not self.poisoned,
                f"robust {robust} needs poisoned, the most clients that may be",
            ),
            (
                self.keep < 1 and (own or self.private or self.compression),
                "federated dropout is for the linear families, without privacy and compression",
            ),
            (
                self.personal and (not own or self.private or self.compression),
                "a personal part is of an own torch model, without privacy and compression",
            ),
            (
                own and (self.standardise or (self.test_fraction and not distils)),
                "an own model standardises and tests by itself; set neither standardise nor test_fraction",
            ),
            (
                not own and (distils or self.arrays or self.frozen or self.loss or self.config),
                'distillation, arrays, frozen, loss and config are of own models; set model = "own"',
            ),
            (
                self.frozen and not self.arrays,
                "frozen goes with arrays: with the digest of what stays, the list of what travels",
            ),
            (
                distils != (self.public is not None),
                'strategy "distillation" needs [horizontal.public], and no other does: rows and digest of the table',
            ),
            (
                distils and (self.arrays or self.frozen or self.personal or self.fine_tune or self.loss or self.config),
                "in a distillation every client keeps its own model: no arrays, frozen or personal part, "
                "fine_tune, loss, config",
            ),
            *self._contradicting_privacy(own, ruled, noise),
        ]

    def _contradicting_privacy(self, own: bool, ruled: bool, noise: str) -> list[tuple[object, str]]:
        if not self.private:
            return []
        record = self.privacy.level == "record"
        return [
            (
                self.strategy not in AVERAGING or self.compression or ruled,
                "privacy goes with the averaging strategies, without compression and robust rule",
            ),
            (
                self.standardise or self.leave_one_out,
                "the sums of standardise and leave_one_out have no noise; turn them off, or privacy",
            ),
            (
                noise == "distributed" and not self.secure,
                'shares of noise hide only the sum: set secure_aggregation = "on", or noise = "local"',
            ),
            (
                record and (own or self.strategy != "fedsgd"),
                'record level clips the gradient of each example: a linear family with strategy = "fedsgd"',
            ),
            (
                self.clients.selection == "rows",
                'selection = "rows" tells how many rows each client has, without noise; choose at random',
            ),
            (
                not own and not self.privacy.rows,
                "privacy needs privacy.rows, a public number of rows: the true one is told without noise",
            ),
            (
                self.model == "logistic" and not self.classes,
                "privacy needs the classes in the agreement: which a client holds is told without noise",
            ),
        ]

    def check(self, clients: int, own: bool = False) -> None:
        """Raises ValueError when so many clients cannot do it, with the reason. own: the coordinator is one of them."""
        asked = self.clients.asked(clients)
        needed = self.clients.needed(asked)
        if needed > asked:
            raise ValueError(f"a quorum of {needed} where {asked} clients are asked in a round")
        if not self.secure:
            return
        if asked < 3:
            raise ValueError(
                f"secure aggregation protects nothing with {asked} clients, each of two subtracts its own update; "
                'it needs three, or agree on secure_aggregation = "none"'
            )
        if 0 < self.clients.quorum < (least := self.threshold(asked, asked, own)):
            raise ValueError(
                f"a quorum of {needed} of {asked} clients; secure aggregation needs {least}: three, and a majority"
            )
        if self.degree >= asked - 1 and self.degree:
            raise ValueError(f"a degree of {self.degree} needs more than {asked} clients; agree on less, or on 0")
        if 0 < self.degree < 2 * math.log2(asked):
            raise ValueError(
                f"a degree of {self.degree} is small for {asked} clients, dropouts would split them; agree on "
                f"{2 * math.ceil(math.log2(asked))} or more, or on 0"
            )
