"""The management API as it is fuzzed; set up by the environment alone."""

from starlette.applications import Starlette
from starlette.routing import Mount

from tfm_guard import Guard
from tfm_guard.testing import CHEAP_HASHING

guard = Guard.from_environment(**CHEAP_HASHING, plans={"free": 1_000_000})

app = Starlette(routes=[Mount("/", guard.management_app())], lifespan=guard.lifespan)
