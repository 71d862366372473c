"""Managing accounts, which own keys and are on a plan."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from tfm_guard.confirmation import Confirmation
from tfm_guard.errors import AccountNotFound, InvalidInput
from tfm_guard.records import Account, Actor, Change, Revocation
from tfm_guard.store import ERASED_ACCOUNT, LockedAccount, Store, Transaction
from tfm_guard.text import check_id

T = TypeVar("T")


class AccountManager:
    """Puts accounts on plans, suspends, resumes and erases them.

    An account that was never mentioned is on the plan "free". *actor* is, everywhere, whom the
    audit log names.
    """

    def __init__(
        self, *, store: Store, confirmation: Confirmation, plans: Mapping[str, int]
    ) -> None:
        self._store = store
        self._confirmation = confirmation
        self._plans = plans

    async def list(self) -> list[Account]:
        """Return all accounts, by their ids."""
        return await self._store.list_accounts()

    async def get(self, account_id: str) -> Account:
        """Return the account. Raises `AccountNotFound`."""
        accounts = await self._store.list_accounts(account_id)
        if not accounts:
            raise AccountNotFound(account_id)
        return accounts[0]

    async def set_plan(self, account_id: str, plan: str) -> None:
        """Put *account_id* on *plan*; keys beyond a smaller plan's limit stay.

        Raises `InvalidInput` for a plan that is not in the settings.
        """
        check_id(account_id, field="account_id")
        if plan not in self._plans:
            known = ", ".join(self._plans)
            raise InvalidInput(("plan",), "unknown_plan", f"Unknown plan {plan!r}. Known: {known}")

        async def change(transaction: Transaction) -> None:
            await transaction.lock_account(account_id)
            await transaction.set_plan(account_id, plan)

        await self._store.transact(change)

    async def suspend(self, account_id: str, *, actor: str | Actor = "application") -> Revocation:
        """Have all keys of the account refused until it is resumed; return when they are.

        As when a key is revoked, `NotConfirmed` is raised where that cannot be shown in time, and
        suspending again joins the wait. Raises `AccountNotFound` and `Unavailable`.
        """

        async def suspend(transaction: Transaction, account: LockedAccount) -> list[Change]:
            states = await transaction.states(account_id, kind="suspended")
            if account.suspended_at is None:
                await transaction.suspend_account(account_id, transaction.now)
                await transaction.change_active_keys("suspended", account_id)
                await _audit(transaction, account_id, actor, "suspended")
            return states

        earlier, changes = await self._store.transact(self._on(account_id, suspend))
        # Of the other keys some may have been revoked a moment ago, which not all may know yet.
        changed = {change.prefix for change in changes}
        others = [state for state in earlier if state.prefix not in changed]
        return await self._confirmation.wait([*others, *changes])

    async def resume(self, account_id: str, *, actor: str | Actor = "application") -> None:
        """Have the keys of a suspended account accepted again. Does nothing for any other.

        Raises `AccountNotFound` and `Unavailable`.
        """

        async def resume(transaction: Transaction, account: LockedAccount) -> None:
            if account.suspended_at is None:
                return
            await transaction.suspend_account(account_id, None)
            await transaction.change_active_keys("resumed", account_id)
            await _audit(transaction, account_id, actor, "resumed")

        await self._store.transact(self._on(account_id, resume))

    async def erase(self, account_id: str) -> None:
        """Revoke all keys of the account, then delete what is known of it, its audit log included.

        Only the prefixes of its keys stay taken. Raises `NotConfirmed` where it cannot be shown in
        time that the keys are refused everywhere; erasing again goes on from there. Raises
        `AccountNotFound` and `Unavailable`.
        """

        async def revoke(transaction: Transaction, _: LockedAccount) -> None:
            await transaction.revoke_keys(account_id)

        async def states(transaction: Transaction, _: LockedAccount) -> list[Change]:
            return await transaction.states(account_id, kind="revoked")

        async def erase(transaction: Transaction, _: LockedAccount) -> bool:
            return await transaction.erase_account(account_id, known=changes)

        erased = False
        while not erased:  # a key may have been created meanwhile, and perhaps revoked
            await self._store.transact(self._on(account_id, revoke))
            # Those too that were revoked earlier, which may not have been confirmed.
            changes, _ = await self._store.transact(self._on(account_id, states))
            await self._confirmation.wait(changes)
            erased, _ = await self._store.transact(self._on(account_id, erase))

    def _on(
        self, account_id: str, work: Callable[[Transaction, LockedAccount], Awaitable[T]]
    ) -> Callable[[Transaction], Awaitable[T]]:
        """Return *work* on the account, which is held, as a transaction."""

        async def run(transaction: Transaction) -> T:
            account = await transaction.lock_known_account(account_id)
            if account is None or account_id == ERASED_ACCOUNT:
                raise AccountNotFound(account_id)
            return await work(transaction, account)

        return run


async def _audit(
    transaction: Transaction, account_id: str, actor: str | Actor, action: str
) -> None:
    await transaction.audit(
        account_id=account_id,
        actor=actor,
        action=f"account.{action}",
        target_type="account",
        target_id=account_id,
        target_name=account_id,
        meta={},
    )
