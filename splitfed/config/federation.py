"""Who takes part in a run, and how their work is combined."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from splitfed.config.section import Section

_WHY_EVERYONE_IS_NEEDED = {
    "sflv2": "agents take turns, so that whoever comes last would always be late",
    "parallel": "a step waits for all that were asked, and whoever is late is in every one of them",
}


class FederationSection(Section):
    """Who takes part, and how their work is combined."""

    agents: Annotated[int, Field(ge=1)] = 1
    """Agents to wait for before the first round starts."""
    population: Annotated[int, Field(ge=1)] | None = None
    """Most agents that may ever take part, some of them from a later round on; left out = agents."""
    cohort: Annotated[int, Field(ge=1)] | None = None
    """Agents per round, drawn anew for each from those that are here; left out = all that are here."""
    over_selection: Annotated[int, Field(ge=0)] = 0
    """Agents asked beyond the cohort: a round is over with the first cohort updates, and the rest are late."""
    quorum: Annotated[int, Field(ge=1)] = 1
    """Updates below which no round is over, whoever is missing."""
    straggler_margin: Annotated[float, Field(ge=1)] | None = None
    """How many times the median agent's time a round waits for the others; left out = for as long as they make
    progress."""
    late_updates: Literal["drop", "merge"] = "drop"
    """What becomes of an update whose round is over: "drop": nothing; "merge": its change counts in the round that it
    comes in."""
    variant: Literal["sflv1", "sflv2", "parallel", "async"] = "sflv1"
    """How agents share the trunk's adapter in a round: "sflv1": each has its own copy, and the copies are averaged;
    "sflv2": it goes from agent to agent; "parallel": all train it in joint steps; "async": each at its own pace."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """With variant = "async": steps of others that may come between an agent's forward and its step; left out = four
    times the agents of the round."""
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5
    """With variant = "async": a step with s others in between moves by (1 + s) ** -exponent of the learning rate."""
    merge_ends: Literal["round", "step"] = "round"
    """When bottom and top, the ends of the model, are merged: "round": their adapters, once a round; "step", only with
    variant = "parallel": their gradients, at every step."""
    agent_timeout_s: Annotated[float, Field(gt=0)] = 300
    """Seconds without progress after which an agent is taken to be gone."""

    @field_validator("merge_ends")
    @classmethod
    def _has_joint_steps(cls, value: str, info: ValidationInfo) -> str:
        if value == "step" and info.data.get("variant") not in (None, "parallel"):
            raise ValueError('is "step", which needs variant = "parallel": other variants have no step in common')
        return value

    @field_validator("population")
    @classmethod
    def _holds_the_agents(cls, value: int | None, info: ValidationInfo) -> int | None:
        agents = info.data.get("agents")
        if value is not None and agents is not None and value < agents:
            raise ValueError(f"is {value}, fewer than agents = {agents}; raise it, or leave it out")
        return value

    @field_validator("cohort")
    @classmethod
    def _fits_the_population(cls, value: int | None, info: ValidationInfo) -> int | None:
        population = info.data.get("population") or info.data.get("agents")
        if value is not None and population is not None and value > population:
            raise ValueError(f"is {value}, more than may ever take part ({population}); lower it, or raise population")
        return value

    @field_validator("over_selection")
    @classmethod
    def _leaves_someone_to_ask(cls, value: int, info: ValidationInfo) -> int:
        cohort, population = info.data.get("cohort"), info.data.get("population") or info.data.get("agents")
        if value and cohort is None and "cohort" in info.data:
            raise ValueError(f"is {value}, but without a cohort everyone is asked; set cohort, or leave it out")
        if value and cohort is not None and population is not None and cohort + value > population:
            raise ValueError(
                f"is {value}, which with cohort = {cohort} asks more than may ever take part ({population}); lower it"
            )
        return value

    @field_validator("quorum")
    @classmethod
    def _can_be_met(cls, value: int, info: ValidationInfo) -> int:
        for name in ("cohort", "agents"):
            most = info.data.get(name)
            if most is not None and value > most:
                raise ValueError(f"is {value}, more than {name} = {most}: no round would ever be over; lower it")
        return value

    @model_validator(mode="after")
    def _is_one_plan(self) -> Self:
        if self.variant == "async":
            in_between = self.most_at_work - 1
            if self.max_staleness is not None and self.max_staleness < in_between:
                raise ValueError(
                    f"max_staleness is {self.max_staleness}, but {self.most_at_work} agents at work make up to "
                    f"{in_between} steps in between; raise it"
                )
        else:
            for key in ("max_staleness", "staleness_exponent"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f'{key} needs variant = "async", not "{self.variant}", whose steps are never stale; set it, or '
                        f"leave {key} out"
                    )
        if self.over_selection and (why := _WHY_EVERYONE_IS_NEEDED.get(self.variant)) is not None:
            raise ValueError(
                f'over_selection is {self.over_selection}, but with variant = "{self.variant}" {why}; leave it out'
            )
        if self.late_updates == "merge" and not self._can_be_late:
            raise ValueError(
                'late_updates = "merge" has nothing to merge: without straggler_margin, over_selection or a cohort '
                "below all agents a round waits for every agent that makes progress; set one of them, or leave "
                "late_updates out"
            )
        return self

    @property
    def _can_be_late(self) -> bool:
        """A round may be closed while an agent is at work on it.

        With a cohort it may without further settings: one asked in place of a silent agent, which then comes back.
        """
        most = self.population or self.agents
        has_spares = self.cohort is not None and self.cohort < most
        return self.straggler_margin is not None or self.over_selection > 0 or has_spares

    @property
    def most_at_work(self) -> int:
        """Agents that may be at work in a round at the same time."""
        if self.cohort is not None:
            return self.cohort + self.over_selection
        return self.population or self.agents
