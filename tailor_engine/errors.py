"""The two exceptions that a user can meet: each carries one clear line."""


class TailorError(Exception):
    """Something failed that the user did not cause (exit code 1)."""


class UserError(TailorError):
    """The user's input cannot be used as it stands (exit code 2)."""
