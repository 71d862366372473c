"""All words of the page. A translation is a subclass that says them in another language.

In braces stand values, which a template puts in. What depends on a number is a method.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final

from tfm_guard.errors import InvalidInput, Refusal
from tfm_guard.records import AuditRow, UsageRange

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR
_MONTH: Final = 30 * _DAY
_YEAR: Final = 365 * _DAY


class Texts:
    """The page in English."""

    language: str = "en"
    # The direction in which the language is written: "ltr" or "rtl".
    direction: str = "ltr"

    settings: str = "Settings"
    api_keys: str = "API Keys"
    skip: str = "Skip to the content"
    intro: str = (
        "A key lets a program use the API for your account. Give each program its own, with no "
        "more scopes than it needs."
    )
    back_to_list: str = "Back to API Keys"
    cancel: str = "Cancel"

    # The list
    create: str = "Create API key"
    only_see: str = "You can see these keys. Owners and admins of your account can change them."
    limit_reached: str = "Your plan has no room for another key"
    limit_what_to_do: str = "Delete a key that is not needed any more, or move to a larger plan."
    larger_plan: str = "See the plans"
    suspended: str = (
        "Your account is suspended: its keys are refused until it is resumed. You can still delete "
        "keys."
    )
    search: str = "Search by name or prefix"
    search_button: str = "Search"
    search_hint: str = "Of a key, only its first 14 characters: the rest is secret"
    clear_search: str = "Show all"
    nothing_found: str = "No key has “{wanted}” in its name or prefix."
    name: str = "Name"
    scopes: str = "Scopes"
    created: str = "Created"
    last_used: str = "Last used"
    use_in_a_week: str = "Use in 7 days"
    actions: str = "Actions"
    no_scopes: str = "none: it may do nothing"
    never: str = "never"
    rotate: str = "Rotate"
    delete: str = "Delete"
    rotate_key: str = "Rotate {name}"
    delete_key: str = "Delete {name}"
    pages: str = "Pages"
    previous_page: str = "Previous"
    next_page: str = "Next"

    # What there is to say about a key
    statuses: Mapping[str, str] = MappingProxyType(
        {
            "never_used": "Never used",
            "idle": "Idle",
            "expiring": "Expires soon",
            "replaced": "Replaced",
            "ok": "Active",
            "revoking": "Being revoked",
        }
    )
    ends: str = "Works until {moment}"
    being_revoked: str = (
        "Revoked. One of the servers has not confirmed yet that it refuses the key."
    )
    ask_again: str = "Ask again"
    ask_again_for: str = "Ask again whether {name} is refused everywhere"

    # No keys yet
    empty_title: str = "No keys yet"
    empty_text: str = "Create your first key, then send your first request:"
    empty_member: str = "Your account has no keys yet. Owners and admins can create one."
    first_steps_title: str = "Your first request"
    first_step_key: str = (
        "Put the key where the programs below find it, and nowhere else: run this in bash or zsh, "
        "paste the key, which is not shown, and press Enter."
    )
    first_steps: Mapping[str, str] = MappingProxyType(
        {
            "curl": """\
curl {api_url}/v1/emails/ \\
  -H "Authorization: Bearer $TFM_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{"from_": {"email": "you@example.com"}, "to": [{"email": "you@example.com"}],
       "subject": "Hello", "text": "It works."}'
""",
            "Python": """\
import json, os, urllib.request

email = {
    "from_": {"email": "you@example.com"},
    "to": [{"email": "you@example.com"}],
    "subject": "Hello",
    "text": "It works.",
}
request = urllib.request.Request(
    "{api_url}/v1/emails/",
    json.dumps(email).encode(),
    {
        "Authorization": "Bearer " + os.environ["TFM_API_KEY"],
        "Content-Type": "application/json",
    },
)
with urllib.request.urlopen(request) as response:
    print(response.status, response.read().decode())
""",
            "Node.js": """\
// Save as hello.mjs, then: node hello.mjs
const response = await fetch("{api_url}/v1/emails/", {
  method: "POST",
  headers: {
    Authorization: "Bearer " + process.env.TFM_API_KEY,
    "Content-Type": "application/json",
  },
  body: JSON.stringify({
    from_: { email: "you@example.com" },
    to: [{ email: "you@example.com" }],
    subject: "Hello",
    text: "It works.",
  }),
});
console.log(response.status, await response.text());
""",
        }
    )

    # Create
    create_title: str = "Create API key"
    name_hint: str = "What uses the key, like “Web shop” or “CI”."
    scopes_hint: str = "What the key may do. It can do nothing else."
    expiry: str = "Expiry"
    expiry_choices: Mapping[str, str] = MappingProxyType(
        {
            "never": "Never",
            "7": "In 7 days",
            "30": "In 30 days",
            "90": "In 90 days",
            "365": "In a year",
            "date": "On a date",
        }
    )
    expires_on: str = "Last day"
    expires_on_hint: str = "The key works until the end of this day, UTC."
    choose_date: str = "Choose the last day on which the key works"
    bad_date: str = "Write the day as year-month-day, like 2031-12-31"
    bad_choice: str = "Choose one of these"
    bad_form: str = "The form was not understood. Fill it in again."
    created_meanwhile: str = (
        "Since this form was opened, the key “{name}” was created. If it is yours and you did not "
        "store it, delete it. To create another key, send the form again."
    )
    creating: str = "Creating the key…"
    problem: str = "Nothing was changed:"

    # The one time that a key is shown
    copy_now: str = "Copy your key now"
    copy_text: str = (
        "This is the only time that the key {name} is shown. What is kept of it is a hash, from "
        "which it cannot be recovered."
    )
    the_key: str = "The key"
    copy: str = "Copy"
    copied: str = "Copied."
    copy_failed: str = "The browser did not copy it. Select the key and copy it yourself."
    stored: str = "I have stored it"

    # Rotate
    rotate_title: str = "Rotate {name}?"
    rotate_text: str = (
        "A new key with the same name and scopes is created and shown once. The old key {prefix} "
        "goes on working while you put the new one in its place."
    )
    grace: str = "The old key works for another"
    grace_choices: Mapping[str, str] = MappingProxyType(
        {
            "0": "0 hours: it ends at once",
            "3600": "hour",
            "86400": "24 hours",
            "259200": "3 days",
            "604800": "7 days",
        }
    )
    rotating: str = "Creating the new key…"
    old_key_ends: str = "The old key {prefix} works until {moment}."
    old_key_ended: str = "The old key {prefix} works no more."
    old_key_unconfirmed: str = (
        "One of the servers has not confirmed yet that it knows when the old key {prefix} ends. "
        "Delete the old key to be sure that it is refused."
    )
    rotate_button: str = "Rotate key"

    # Delete
    delete_title: str = "Delete {name}?"
    delete_text: str = (
        "The key {prefix} stops working at once, everywhere, and cannot be brought back. Programs "
        "that still use it will be refused."
    )
    used_lately: str = "It was last used {moment}."
    never_used: str = "It was never used."
    delete_button: str = "Delete key"
    deleting: str = "Deleting… waiting until every server refuses the key."
    deleted: str = "The key {prefix} is deleted. Every server refuses it."
    unconfirmed: str = (
        "The key {prefix} is revoked, but one of the servers has not confirmed yet that it refuses "
        "it. It stays in the list until that is sure."
    )

    # One key
    expires: str = "Expires"
    prefix: str = "Prefix"
    status: str = "Status"
    replaced_by: str = "Replaced by"
    successor: str = "its successor"
    replaces: str = "Takes the place of"
    predecessor: str = "a key in its grace"
    usage: str = "Usage"
    range_: str = "Range"
    ranges: Mapping[UsageRange, str] = MappingProxyType(
        {"24h": "24 hours", "7d": "7 days", "30d": "30 days", "90d": "90 days"}
    )
    accepted: str = "Accepted"
    refused: str = "Refused"
    as_table: str = "As a table"
    from_: str = "From (UTC)"
    left_out: str = "Times without requests are left out."
    no_use: str = "No requests in this time."
    history: str = "History"
    history_text: str = "What was done to this key in the last 90 days."
    when: str = "When"
    who: str = "Who"
    what: str = "What"
    nothing_happened: str = "Nothing in the last 90 days."
    actions_done: Mapping[str, str] = MappingProxyType(
        {
            "api_key.created": "Created",
            "api_key.rotated": "Rotated: replaced by a new key",
            "api_key.revoked": "Deleted",
            "api_key.renamed": "Renamed",
            "api_key.narrowed": "Lost scopes",
            "api_key.idle": "Noticed: not used for 90 days",
            "api_key.expiring": "Noticed: expires within 14 days",
            "api_key.unusual_use": "Noticed: unusual use",
        }
    )
    actors: Mapping[str, str] = MappingProxyType(
        {
            "application": "The application",
            "command_line": "The command line",
            "tfm-guard": "tfm-guard",
        }
    )
    actor_is_key: str = "The API key {id}"

    # When something cannot be done
    not_signed_in_title: str = "You are not signed in"
    not_signed_in: str = "Sign in to see the API keys of your account."
    sign_in: str = "Sign in"
    form_expired: str = (
        "This form is too old, or belongs to somebody else who was signed in. Nothing was changed. "
        "Open the page again."
    )
    refusal_titles: Mapping[int, str] = MappingProxyType(
        {
            403: "Not allowed",
            404: "Not found",
            405: "Not possible",
            409: "Not possible now",
            413: "Too long",
            422: "Not understood",
            503: "Not now",
        }
    )
    refusals: Mapping[str, str] = MappingProxyType(
        {
            "cross_origin": "This request came from another site. Nothing was changed.",
            "not_allowed": (
                "You may see the API keys of your account, but not change them. Ask an owner or an "
                "admin."
            ),
            "not_found": "There is no such key in your account, or not any more.",
            "no_such_page": "There is nothing at this address.",
            "method_not_allowed": "This address does not answer to this method.",
            "body_too_large": "The form is too long.",
            "unavailable": "This cannot be known now. Try again in a few seconds.",
        }
    )

    def plan_use(self, used: int, limit: int, plan: str) -> str:
        """Say how many of the plan's keys there are."""
        keys = "key" if limit == 1 else "keys"
        return f"{used} of {limit} {keys} of the plan “{plan}” used"

    def shown(self, first: int, last: int, total: int) -> str:
        """Say which keys of a long list are shown."""
        return f"{first}–{last} of {total}"

    def requests(self, accepted: int, refused: int) -> str:
        """Say how many requests were accepted and refused."""
        if not accepted and not refused:
            return "no requests"
        return f"{accepted:,} accepted, {refused:,} refused"

    def chart_title(self, accepted: int, refused: int, range_: UsageRange) -> str:
        """Describe a chart to who does not see it."""
        return f"{self.requests(accepted, refused)} in {self.ranges[range_]}"

    def chart_unit(self, unit: str) -> str:
        """Say what a bar of a chart counts."""
        return f"Requests per {unit}; times in UTC"

    def left_in_history(self, count: int) -> str:
        """Say that older rows are not shown."""
        return f"and {count:,} more before"

    def ago(self, moment: datetime, now: datetime) -> str:
        """Say how long before or after *now* a moment is."""
        seconds = int((now - moment) / timedelta(seconds=1))
        if abs(seconds) < _MINUTE:
            return "just now" if seconds >= 0 else "in a moment"
        length = self._length(abs(seconds))
        return f"{length} ago" if seconds > 0 else f"in {length}"

    def _length(self, seconds: int) -> str:
        units = {
            "year": _YEAR,
            "month": _MONTH,
            "day": _DAY,
            "hour": _HOUR,
            "minute": _MINUTE,
        }
        for unit, length in units.items():
            if count := seconds // length:
                return f"{count} {unit}{'' if count == 1 else 's'}"
        return "moments"

    def exact(self, moment: datetime) -> str:
        """Write a moment out, in UTC."""
        return f"{moment:%Y-%m-%d %H:%M} UTC"

    def hour(self, moment: datetime) -> str:
        """Write the hour that begins at *moment*."""
        return f"{moment:%Y-%m-%d %H:%M}"

    def day(self, moment: datetime) -> str:
        """Write a day."""
        return f"{moment:%Y-%m-%d}"

    def who_did(self, actor: str) -> str:
        """Say who an actor of the audit log is."""
        kind, _, name = actor.partition(":")
        if kind == "person":
            return name
        if kind == "api_key":
            return self.actor_is_key.format(id=name)
        return self.actors.get(actor, actor)

    def what_happened(self, row: AuditRow) -> str:
        """Say what a row of the audit log records, with what is particular about it."""
        what = self.actions_done.get(row.action, row.action)
        match row.action, row.meta:
            case "api_key.renamed", {"name": name}:
                return f"{what}: “{row.target_name}” is now “{name}”"
            case "api_key.narrowed", {"removed": removed}:
                return f"{what}: {', '.join(removed)}"
            case "api_key.unusual_use", {"requests": requests, "usual": usual, "hour": hour}:
                return f"{what}: {requests} requests, usually {usual}, in the hour from {hour}"
        return what

    def refusal(self, refusal: Refusal) -> str:
        """Say why something was not done."""
        return self.refusals.get(refusal.code, refusal.message)

    def fault(self, error: InvalidInput) -> str:
        """Say what is wrong with what was typed."""
        return error.message
