"""The exceptions of the package: one base, subclasses by who has to act.

Messages follow one grammar: the argument in backticks, the rule, the value that broke it, the way out.
"""


class HfAdaclipError(Exception):
    """Base of every error that hf_adaclip raises on purpose."""


class ConfigError(HfAdaclipError, ValueError):
    """A setting is wrong; the user has to change it. Carries every problem found, not just the first.

    Args:
        problems: One sentence per problem, each naming field, rule and value.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        text = self.problems[0] if len(self.problems) == 1 else "\n".join(f"- {p}" for p in self.problems)
        super().__init__(text)


class UnsupportedSetupError(HfAdaclipError, RuntimeError):
    """The combination of libraries or devices is not supported; the message names what is."""


class StateError(HfAdaclipError, RuntimeError):
    """A saved controller state is missing a part, damaged, or belongs to another configuration."""


class LedgerError(HfAdaclipError, RuntimeError):
    """A ledger cannot be read or written at all (a ledger that is readable but wrong is a finding, not an error)."""


class ClippingDefeatedError(HfAdaclipError, RuntimeError):
    """The check at the start found that clipping does not take effect: something else undoes it, or the seam is never reached."""


class RankDisagreementError(HfAdaclipError, RuntimeError):
    """The ranks of a distributed run do not decide alike; their weights would drift apart."""


class TrainingTroubleError(HfAdaclipError, RuntimeError):
    """Trouble was found and `on_trouble` is 'stop': the run ends here, with the weights as they are.

    Args:
        message: The full text for people.
        step: The optimizer step at which trouble was found, counted from 0.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class NonFiniteGradientError(HfAdaclipError, RuntimeError):
    """Too many steps in a row had a NaN or infinite gradient norm; every one of them was skipped.

    Args:
        message: The full text for people.
        step: The last optimizer step of the series, counted from 0.
        consecutive: How many steps in a row were skipped.
        checkpoint: The last checkpoint that was written or loaded; None when there was none. Its weights are good: skipped steps
            leave them as they are.
    """

    def __init__(self, message: str, *, step: int, consecutive: int, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.consecutive = consecutive
        self.checkpoint = checkpoint
