//! A new flow's backend: who may ask, which backends count for him, and which of them it is.

use proxy_common::addr::mix;
use proxy_common::tables::{
    AffinityKey, AffinityValue, Algorithm, Backend, Choice, Range, RangeData, ServiceKey,
    ServiceValue, SourceRange, expired,
};
use proxy_common::{Family, Outcome, Port};

use super::{Service, Tables};

/// Why there is no backend for a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The address is no Service's, or only some of its ports are.
    NotService,
    /// It is the host's own, or another proxy's.
    Others,
    /// There is nobody to answer: to be refused.
    Refused,
    /// The packet is dropped under this name.
    Dropped(Outcome),
}

/// What a frontend's policies look at.
#[derive(Clone, Copy)]
pub struct Asker {
    /// He is no pod of this node, and not the node.
    pub outside: bool,
    /// He is in the Service's source ranges.
    pub allowed: bool,
}

/// The Service port that an address with a mark has at a port.
///
/// # Errors
/// If it has none there.
#[inline(always)]
pub fn frontend<F: Family, T: Tables<F>>(
    tables: &T,
    mark: &Service,
    address: F::Addr,
    port: Port,
    proto: u8,
) -> Result<Service, Failure> {
    if let Some(service) = tables.service(&ServiceKey::new(address, port, proto))
        && (mark.has(ServiceValue::NODE) || !service.has(ServiceValue::HOST_PORT))
    {
        return Ok(service);
    }
    if mark.has(ServiceValue::NODE)
        && let Some(service) = tables.service(&ServiceKey::node_port(port, proto))
        && (mark.has(ServiceValue::NODE_PORTS) || service.has(ServiceValue::HOST_PORT))
    {
        return Ok(service);
    }
    Err(if mark.has(ServiceValue::REFUSES) { Failure::Refused } else { Failure::NotService })
}

/// The key under which an address is looked for among the ranges of a Service of that number.
#[inline(always)]
pub fn source_range<F: Family>(service: u32, address: F::Addr) -> SourceRange<F> {
    let prefix = RangeData::<F>::SERVICE_BITS + u32::from(F::BITS);
    SourceRange { prefix, data: RangeData { service: service.to_be_bytes(), address } }
}

/// One of the Service's backends: the one that the client stays with, or one chosen by the number that
/// `draw` gives.
///
/// # Errors
/// Says why there is none.
#[inline(always)]
pub fn backend<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    asker: Asker,
    client: &AffinityKey<F>,
    draw: impl FnOnce() -> u32,
) -> Result<(u32, Backend<F>), Failure> {
    let (choice, flag) = eligible::<F>(service, asker)?;
    let now = if service.affinity == 0 { 0 } else { tables.now() };
    let known =
        if service.affinity == 0 { None } else { sticky(tables, service, client, flag, now) };
    let found = match known {
        Some(known) => known,
        None => pick(tables, service, choice, draw()).ok_or(Failure::Refused)?,
    };
    if service.affinity != 0 {
        let value =
            AffinityValue { backend: found.0, seen: now, generation: found.1.generation, pad: 0 };
        tables.remember_affinity(client, &value);
    }
    Ok(found)
}

/// The backends that an asker's is chosen from, of which there are some, and the flag that tells them.
///
/// # Errors
/// Says why there are none.
#[inline(always)]
pub fn eligible<F: Family>(service: &Service, asker: Asker) -> Result<(Choice, u32), Failure> {
    // KP-94: before there is a word about endpoints.
    if service.has(ServiceValue::SOURCE_RANGES) && !asker.allowed {
        return Err(Failure::Dropped(Outcome::NotAllowed));
    }
    let local = service.has(ServiceValue::LOCAL_FOR_ALL)
        || asker.outside && service.has(ServiceValue::LOCAL_FOR_OUTSIDE);
    let (choice, flag) = if local {
        (service.local, Backend::<F>::IN_LOCAL)
    } else {
        (service.cluster, Backend::<F>::IN_CLUSTER)
    };
    if choice.count == 0 {
        let elsewhere = service.cluster.count != 0;
        return Err(if elsewhere { Failure::Dropped(Outcome::NoLocal) } else { Failure::Refused });
    }
    Ok((choice, flag))
}

/// The backend that the client stays with, if it still takes such flows (KP-97).
#[inline(always)]
fn sticky<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    client: &AffinityKey<F>,
    flag: u32,
    now: u32,
) -> Option<(u32, Backend<F>)> {
    let known = tables.affinity(client)?;
    if expired(known.seen, service.affinity, now) {
        return None;
    }
    let backend = tables.backend(known.backend)?;
    let same = backend.generation == known.generation && backend.service == service.id;
    (same && backend.flags & flag != 0).then_some((known.backend, backend))
}

/// The backend that a number stands for among those to choose from, of which there are some.
#[inline(always)]
fn pick<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    choice: Choice,
    number: u32,
) -> Option<(u32, Backend<F>)> {
    let index = if service.chooses(Algorithm::RoundRobin) {
        number % choice.count
    } else {
        scale(number, choice.count)
    };
    let mut chosen = member(tables, choice, index)?;
    if service.chooses(Algorithm::LeastConn) && choice.count > 1 {
        // Any of the others.
        let step = 1 + scale(mix(number, choice.count), choice.count - 1);
        let other = member(tables, choice, (index + step) % choice.count)?;
        if is_less_busy(tables, other, chosen) {
            chosen = other;
        }
    }
    let backend = tables.backend(chosen)?;
    // The slots of a reader that was held up for long may be another Service port's by now.
    (backend.service == service.id).then_some((chosen, backend))
}

/// The number of the backend that is at a place of a table.
#[inline(always)]
fn member<F: Family, T: Tables<F>>(tables: &T, choice: Choice, index: u32) -> Option<u32> {
    let position = if choice.table == Range::NO_TABLE {
        index
    } else {
        tables.slot(choice.table.wrapping_add(index))?
    };
    tables.slot(choice.members.wrapping_add(position))
}

/// Whether one backend has fewer flows for its weight than another.
#[inline(always)]
fn is_less_busy<F: Family, T: Tables<F>>(tables: &T, one: u32, other: u32) -> bool {
    let load = |number: u32| u64::from(tables.load(number));
    let weight =
        |number: u32| tables.backend(number).map_or(1, |backend| u64::from(backend.weight));
    load(one) * weight(other) < load(other) * weight(one)
}

/// Scales a hash to a number below `count`, without a division.
#[inline(always)]
pub fn scale(hash: u32, count: u32) -> u32 {
    ((u64::from(hash) * u64::from(count)) >> 32) as u32
}
