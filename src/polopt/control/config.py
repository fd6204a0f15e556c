"""Configuration of a control run."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from polopt.settings import Settings


class ControlConfig(Settings):
    """Which policy, and how it acts. The environment is the task."""

    horizon: int | None = Field(None, ge=0)
    """Steps of each environment in an iteration, which live on across iterations; 0: whole episodes from start states. If
    not given, 50 for off-policy methods, 256 for others with a critic and 0 for the rest."""
    vectorization: Literal["sync", "native"] = "sync"
    """"native": the environment's own vectorised implementation."""
    restore: Literal["replay", "reset"] = "replay"
    """What becomes of episodes under way at a checkpoint. "replay": a resumed run repeats their actions; the environment
    must be deterministic given its seed. "reset": new episodes begin at every checkpoint, resumed or not."""
    environments: int = Field(32, ge=1)
    """Environments that are stepped together for whole episodes and for scores."""
    start_states: int = Field(1024, ge=1)
    """Start states (seeds of resets) that training draws from where it takes whole episodes."""
    distribution: Literal["auto", "gaussian", "squashed"] = "auto"
    """Policy over continuous actions: a Gaussian clipped to the bounds, or one squashed by tanh; "auto" is "gaussian",
    for off-policy methods "squashed"."""
    state_dependent_std: bool = False
    """The Gaussian's standard deviation depends on the observation."""
    log_std: float = 0.0
    """Logarithm of the Gaussian's initial standard deviation."""
    hidden: list[int] | None = Field(None, min_length=1)
    """Units of the hidden layers of policy and critic each. If not given, 64 and 64; 256 and 256 for off-policy methods."""
    activation: Literal["tanh", "relu", "elu"] | None = None
    """Nonlinearity of the hidden layers. If not given, "tanh"; "relu" for off-policy methods."""
    normalize_observations: bool = False
    """Standardise observations by running moments, clipped at 10."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return, clipped at 10."""
    gamma: float = Field(0.99, ge=0, le=1)
    """Discount of the returns that normalise rewards."""
    report_info: list[str] = Field(default_factory=list)
    """Numeric entries of the environment's `info` whose sums over episodes are reported."""
    score_policy: Literal["deterministic", "stochastic"] = "deterministic"
    """How the policy acts in held-out scores: the distribution's mode, or a draw."""
    collect_policy: Literal["stochastic", "deterministic"] = "stochastic"
    """How an off-policy method acts while it collects; others always draw."""
    uniform_start: bool = True
    """An off-policy method's actions are uniform within the bounds until its first update."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the networks."""
    micro_batch: int = Field(16384, ge=1)
    """Decisions evaluated at once; bounds memory, never changes the result."""

    @field_validator("hidden")
    @classmethod
    def _widths_are_positive(cls, hidden: list[int] | None) -> list[int] | None:
        if hidden and min(hidden) < 1:
            raise ValueError("every layer needs at least one unit")
        return hidden

    def filled(self, **defaults: Any) -> Self:
        """The same settings, with `defaults` for the fields that are None."""
        return self.model_copy(update={n: value for n, value in defaults.items() if getattr(self, n) is None})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.vectorization == "native" and self.restore == "replay":
            raise ValueError(
                "vectorization = 'native': its environments share one seed and cannot be replayed; set restore = 'reset'"
            )
        return self
