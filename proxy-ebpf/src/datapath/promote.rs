//! How a flow becomes live, and what if there is no room for it.

use proxy_common::tables::{FlowKey, Memory, Origin, State};
use proxy_common::{Family, Outcome};

use super::pending::{Keys, is_alive};
use super::{Refused, Tables, live};

/// Moves a client's flow among the live ones, if there is room. `None` if a live flow of another client has its
/// place: then this one is over.
#[inline(always)]
pub(super) fn promote<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    origin: Origin,
    state: State,
    now: u32,
) -> Option<Outcome> {
    let reply = insert_reply(tables, (key, other), memory, origin, now);
    if reply == Err(Refused::Full) {
        return Some(stay(tables, (key, other), memory, state));
    }
    if reply == Err(Refused::Exists) && is_anothers(tables, (key, other), &mut memory.spare) {
        return None;
    }
    memory.live.fill(key, other, origin, now);
    memory.live.state = state as u8;
    let forward = tables.insert_flow(key, &memory.live);
    if forward == Err(Refused::Full) {
        if reply.is_ok() {
            tables.remove(other);
        }
        return Some(stay(tables, (key, other), memory, state));
    }
    // Another CPU that had inserted the reply's may have found no room for this one, and taken that back.
    if reply.is_err()
        && live::half(tables, key, other, &mut memory.spare).is_none()
        && insert_reply(tables, (key, other), memory, origin, now) == Err(Refused::Full)
    {
        if forward.is_ok() {
            tables.remove(key);
        }
        return Some(stay(tables, (key, other), memory, state));
    }
    Some(Outcome::Established)
}

/// Whether a live flow of another client has the place of a flow's answers.
#[inline(always)]
pub(super) fn is_anothers<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    spare: &mut FlowKey<F>,
) -> bool {
    let record = tables.flow(other);
    record.is_some_and(|record| record.read(other, spare).is_some() && *spare != *key)
}

/// Inserts the reply's record of a live flow.
#[inline(always)]
fn insert_reply<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    origin: Origin,
    now: u32,
) -> Result<(), Refused> {
    memory.live.fill(other, key, origin.inverse(), now);
    tables.insert_flow(other, &memory.live)
}

/// Keeps a live flow where it is, since there is no room among live ones.
#[inline(always)]
fn stay<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    state: State,
) -> Outcome {
    tables.count(Outcome::TableFull, 1);
    mark(tables, (key, other), memory, state);
    if half_is_making(tables, (key, other), memory) {
        mark(tables, (other, key), memory, State::Established);
    }
    Outcome::Forwarded
}

#[inline(always)]
fn half_is_making<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
) -> bool {
    tables
        .embryo(other)
        .and_then(|record| record.read(other, &mut memory.spare))
        .is_some_and(|(facts, _)| memory.spare == *key && !is_alive(facts.state))
}

/// Notes a direction's state in its record, if it still leads to `other`.
#[inline(always)]
fn mark<F: Family, T: Tables<F>>(
    tables: &T,
    (key, other): Keys<'_, F>,
    memory: &mut Memory<F>,
    state: State,
) {
    if let Some(record) = tables.embryo(key)
        && record.read(key, &mut memory.spare).is_some()
        && memory.spare == *other
    {
        record.common().set_state(state);
    }
}
