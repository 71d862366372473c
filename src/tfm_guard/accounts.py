"""Managing accounts, which own keys and are on a plan."""

from collections.abc import Mapping
from typing import Final

from tfm_guard.errors import InvalidInput
from tfm_guard.store import Store, Transaction
from tfm_guard.text import plain_text

MAXIMUM_ID_LENGTH: Final = 255


class AccountManager:
    """Puts accounts on plans. An account that was never mentioned is on the plan "free"."""

    def __init__(self, *, store: Store, plans: Mapping[str, int]) -> None:
        self._store = store
        self._plans = plans

    async def set_plan(self, account_id: str, plan: str) -> None:
        """Put *account_id* on *plan*; keys beyond a smaller plan's limit stay.

        Raises `InvalidInput` for a plan that is not in the settings.
        """
        check_account_id(account_id)
        if plan not in self._plans:
            known = ", ".join(self._plans)
            raise InvalidInput(("plan",), "unknown_plan", f"Unknown plan {plan!r}. Known: {known}")

        async def change(transaction: Transaction) -> None:
            await transaction.lock_account(account_id)
            await transaction.set_plan(account_id, plan)

        await self._store.transact(change)


def check_account_id(account_id: str) -> None:
    """Raise `InvalidInput` unless *account_id* is 1 to 255 plain characters, without blanks around.

    It is the host application's own name for the account, so it is taken as it is or not at all.
    """
    if plain_text(account_id, field="account_id", most=MAXIMUM_ID_LENGTH) != account_id:
        raise InvalidInput(("account_id",), "string_blank", "Blanks around it are not allowed")
