"""What goes wrong: each fault is begun, and returns how it ends."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import msgspec

from tests.simulation.redis_servers import RedisServer, Value
from tfm_guard.link import Acknowledgement, Message

if TYPE_CHECKING:
    from tests.simulation.process import Process
    from tests.simulation.world import World

End = Callable[[], None]
Fault = Callable[["World"], End]


def _nothing() -> None:
    pass


def _victims(world: "World") -> "list[Process]":
    """Return one process, or all."""
    if world.timeline.random.random() < 0.25:
        return list(world.processes)
    return [_lonely(world)]


def _lonely(world: "World") -> "Process":
    """Return the one process that a fault is about."""
    world.victim = world.timeline.random.choice(world.processes)
    return world.victim


def pause(world: "World") -> End:
    """A process stops, or its event loop stalls, while time goes on."""
    victims = _victims(world)
    for process in victims:
        process.paused = True

    def resume() -> None:
        for process in victims:
            process.paused = False

    return resume


def crash(world: "World") -> End:
    """A process is killed; later another takes its place."""
    process = world.timeline.random.choice(world.processes)
    if process.running:
        process.crash()
    return lambda: None if process.running else process.start()


def restart(world: "World") -> End:
    """A process closes its guard in good order and is then replaced."""
    process = world.timeline.random.choice(world.processes)
    if not process.running:
        return _nothing
    life = process.lives
    process.spawn(process.guard.close())

    def replace_it() -> None:
        if process.lives == life:
            if process.running:
                process.crash()
            process.start()

    return replace_it


def cut_from_database(world: "World") -> End:
    """Processes lose the database: in silence, refused at once, or now and then."""
    return _cut(world, "database")


def cut_from_redis(world: "World") -> End:
    """Processes lose Redis: in silence, refused at once, or now and then."""
    return _cut(world, world.deployment.primary.name)


def cut_from_both(world: "World") -> End:
    """Processes lose the database and Redis at once."""
    first, second = _cut(world, "database"), _cut(world, world.deployment.primary.name)

    def end() -> None:
        first()
        second()

    return end


def _cut(world: "World", server: str) -> End:
    network = world.network
    pairs = {(process.name, server) for process in _victims(world)}
    how = world.timeline.random.choice((network.silent, network.refused, network.losing))
    if server == "database" and world.database.dialect == "sqlite":
        how = network.refused  # a file loses no messages
    how |= pairs
    return lambda: how.difference_update(pairs)


def stop_database(world: "World") -> End:
    """The database is down."""
    world.database.up = False
    return lambda: setattr(world.database, "up", True)


def stop_redis(world: "World") -> End:
    """Redis is killed; it comes back empty, or with what it had saved."""
    server = world.deployment.primary
    server.stop()

    def come_back() -> None:
        values = world.timeline.random.choice([{}, *world.deployment.snapshots])
        server.restart(world.deployment.new_run_id(), dict(values))

    return come_back


def freeze_redis(world: "World") -> End:
    """Redis answers nothing for a while, and then everything."""
    server = world.deployment.primary
    server.paused_until = world.timeline.now + world.timeline.random.uniform(0.1, 5.0)
    return lambda: setattr(server, "paused_until", 0.0)


def pause_writes(world: "World") -> End:
    """Redis executes no command that writes for a while."""
    server = world.deployment.primary
    server.writes_paused_until = world.timeline.now + world.timeline.random.uniform(0.1, 5.0)
    return lambda: setattr(server, "writes_paused_until", 0.0)


def empty_redis(world: "World") -> End:
    """Somebody flushes Redis, or memory pressure evicts a part."""
    values = world.deployment.primary.values
    for name in list(values):
        if world.timeline.random.random() < world.timeline.random.choice((0.5, 1.0)):
            del values[name]
    return _nothing


def restore_redis(world: "World") -> End:
    """Redis is set back to what it held at an earlier moment."""
    if world.deployment.snapshots:
        snapshot = world.timeline.random.choice(world.deployment.snapshots)
        world.deployment.primary.values = dict(snapshot)
    return _nothing


def replay(world: "World") -> End:
    """Somebody writes entries back that were genuine once, again and again."""
    going_on = [True]

    def write() -> None:
        for snapshot in world.deployment.snapshots:
            for name, value in snapshot.items():
                ends = world.timeline.now + 100.0
                world.deployment.primary.values[name] = replace(value, ends=ends)
        if going_on:
            world.timeline.after(0.05, write)

    write()
    return going_on.clear


def vandalize(world: "World") -> End:
    """Somebody writes what is no entry, or the entry of another key, again and again."""
    random = world.timeline.random
    going_on = [True]

    def write() -> None:
        values = world.deployment.primary.values
        names = list(values)
        for name in names:
            if random.random() < 0.5:
                content = values[random.choice(names)].content
                values[name] = Value(_spoilt(content, random), world.timeline.now + 100.0)
        if going_on:
            world.timeline.after(random.uniform(0.0, 0.3), write)

    write()
    return going_on.clear


def _spoilt(content: bytes | list[bytes], random: Random) -> bytes | list[bytes]:
    """Return *content*, or something near it, or something else."""
    if not isinstance(content, bytes) or not content:
        return b""
    position = random.randrange(len(content))
    broken = content[:position] + random.randbytes(1) + content[position + 1 :]
    spoilt: list[bytes | list[bytes]] = [content, content, broken, content[:position], [b"x"]]
    return random.choice(spoilt)


def split(world: "World") -> End:
    """One process and Redis are cut off from the others and the database."""
    lonely = _lonely(world)
    server = world.deployment.primary.name
    others = {(process.name, server) for process in world.processes if process is not lonely}
    pairs = {*others, (lonely.name, "database")}
    how = world.timeline.random.choice((world.network.silent, world.network.refused))
    if world.database.dialect == "sqlite":
        how = world.network.refused  # as above
    seconds = 0.0
    if world.timeline.random.random() < 0.5:
        # Just when its link has been lost, and is perhaps there again.
        for connection in list(world.deployment.primary.connections):
            if connection.process is lonely:
                connection.reset()
        seconds = world.timeline.random.uniform(0.0, 0.4)
    over: list[bool] = []

    def begin() -> None:
        if not over:
            how.update(pairs)

    world.timeline.after(seconds, begin)

    def join_again() -> None:
        over.append(True)
        how.difference_update(pairs)

    return join_again


def isolate_primary(world: "World") -> End:
    """A replica takes over; one process stays with the old primary, cut off from all else."""
    deployment, network = world.deployment, world.network
    lonely = _lonely(world)
    old = deployment.primary
    fail_over(world)
    old.role = "master"
    deployment.stuck[lonely.name] = old
    silent = {(process.name, old.name) for process in world.processes if process is not lonely}
    cut = {(lonely.name, "database")} if world.timeline.random.random() < 0.7 else set()
    how = network.refused if world.database.dialect == "sqlite" else network.silent
    how |= cut
    network.silent |= silent
    for connection in list(old.connections):
        if connection.process is not lonely and world.timeline.random.random() < 0.8:
            connection.reset()

    def join_again() -> None:
        how.difference_update(cut)
        network.silent.difference_update(silent)
        deployment.stuck.pop(lonely.name, None)
        old.role = "slave" if deployment.primary is not old else "master"
        for connection in list(old.connections):
            connection.reset()

    return join_again


def kill_subscribers(world: "World") -> End:
    """Redis drops the connections of a process, or of all."""
    victims = _victims(world)
    for connection in list(world.deployment.primary.connections):
        if connection.process in victims:
            connection.reset()
    return _nothing


def leave_half_open(world: "World") -> End:
    """The connections of a process, or of all, go on to exist and pass nothing."""
    victims = _victims(world)
    for connection in world.deployment.primary.connections:
        if connection.process in victims:
            connection.die()
    return _nothing


def _pretend(world: "World", server: RedisServer) -> None:
    """Acknowledge, for everybody, what was published last; the seal is all that is not right."""
    told = [payload for channel, payload in server.published if channel.endswith(b"changes")]
    if not told:
        return
    payload = told[-1]
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        message = msgspec.msgpack.decode(payload[:-16], type=Message)
        for worker_id in world.database.tables.workers:
            said = Acknowledgement(worker_id, message.id)
            body = msgspec.msgpack.encode(said)
            server.publish(message.reply_to.encode(), body + payload[-16:])


def forge(world: "World") -> End:
    """Somebody publishes garbage, and what was published before, there or elsewhere."""
    random = world.timeline.random
    going_on = [True]

    def publish() -> None:
        server = world.deployment.primary
        if server.up and server.published:
            channel, _ = random.choice(server.published)
            _, payload = random.choice(server.published)
            if random.random() < 0.5:
                _pretend(world, server)
            position = random.randrange(len(payload) + 1)
            broken = payload[:position] + random.randbytes(1) + payload[position + 1 :]
            server.publish(channel, random.choice([payload, payload, broken, payload[:position]]))
        if going_on:
            world.timeline.after(random.uniform(0.0, 0.1), publish)

    publish()
    return going_on.clear


def fail_over(world: "World") -> End:
    """A replica that lags behind takes over; the old primary becomes its replica."""
    deployment = world.deployment
    old = deployment.primary
    new = next(server for server in deployment.servers if server is not old)
    snapshots = deployment.snapshots or [{}]
    new.restart(deployment.new_run_id(), dict(world.timeline.random.choice(snapshots[-2:])))
    old.role = "slave"
    deployment.primary = new
    return _nothing


def answer_with_old_rows(world: "World") -> End:
    """The database answers a process with rows older than what that process knows to be there."""
    world.database.stale = True
    return lambda: setattr(world.database, "stale", False)


FAULTS: tuple[Fault, ...] = (
    pause,
    crash,
    restart,
    cut_from_database,
    cut_from_redis,
    cut_from_both,
    stop_database,
    stop_redis,
    freeze_redis,
    pause_writes,
    empty_redis,
    restore_redis,
    replay,
    vandalize,
    fail_over,
    split,
    isolate_primary,
    kill_subscribers,
    leave_half_open,
    forge,
    answer_with_old_rows,
)
