//! A new flow's backend: who may ask, which backends count for him, and which of them it is.

use proxy_common::tables::{
    AffinityKey, AffinityValue, Backend, Range, RangeData, ServiceKey, ServiceValue, SourceRange,
    expired,
};
use proxy_common::{Family, Outcome, Port};

use super::{Service, Tables};

/// Why there is no backend for a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The address is no Service's, or only some of its ports are.
    NotService,
    /// There is nobody to answer: to be refused.
    Refused,
    /// The packet is dropped under this name.
    Dropped(Outcome),
}

/// What a frontend's policies look at.
#[derive(Clone, Copy)]
pub struct Asker {
    /// He is no pod and not this node.
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
    if let Some(service) = tables.service(&ServiceKey::new(address, port, proto)) {
        return Ok(service);
    }
    if mark.has(ServiceValue::NODE_PORTS)
        && let Some(service) = tables.service(&ServiceKey::node_port(port, proto))
    {
        return Ok(service);
    }
    Err(if mark.has(ServiceValue::REFUSES) { Failure::Refused } else { Failure::NotService })
}

/// The key under which a client is looked for among a Service's source ranges.
#[inline(always)]
pub fn source_range<F: Family>(service: &Service, client: F::Addr) -> SourceRange<F> {
    let prefix = RangeData::<F>::SERVICE_BITS + u32::from(F::BITS);
    SourceRange { prefix, data: RangeData { service: service.id.to_be_bytes(), address: client } }
}

/// One of the Service's backends: the one that the client stays with, or one chosen by `hash`.
///
/// # Errors
/// Says why there is none.
#[inline(always)]
pub fn backend<F: Family, T: Tables<F>>(
    tables: &T,
    service: &Service,
    asker: Asker,
    client: &AffinityKey<F>,
    hash: u32,
) -> Result<(u32, Backend<F>), Failure> {
    // KP-94: before there is a word about endpoints.
    if service.has(ServiceValue::SOURCE_RANGES) && !asker.allowed {
        return Err(Failure::Dropped(Outcome::NotAllowed));
    }
    let local = service.has(ServiceValue::LOCAL_FOR_ALL)
        || asker.outside && service.has(ServiceValue::LOCAL_FOR_OUTSIDE);
    let (range, flag) = if local {
        (service.local, Backend::<F>::IN_LOCAL)
    } else {
        (service.cluster, Backend::<F>::IN_CLUSTER)
    };
    if range.count == 0 {
        let elsewhere = service.cluster.count != 0;
        return Err(if elsewhere { Failure::Dropped(Outcome::NoLocal) } else { Failure::Refused });
    }
    if service.affinity == 0 {
        return by_hash(tables, range, hash).ok_or(Failure::Refused);
    }
    let now = tables.now();
    let found = match sticky(tables, service, client, flag, now) {
        Some(found) => found,
        None => by_hash(tables, range, hash).ok_or(Failure::Refused)?,
    };
    let value =
        AffinityValue { backend: found.0, seen: now, generation: found.1.generation, pad: 0 };
    tables.remember_affinity(client, &value);
    Ok(found)
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

/// A backend by a hash: the same flow finds the same backend again as long as the Service does not
/// change.
#[inline(always)]
fn by_hash<F: Family, T: Tables<F>>(
    tables: &T,
    range: Range,
    hash: u32,
) -> Option<(u32, Backend<F>)> {
    let index = scale(hash, range.count);
    let number = tables.slot(range.first.wrapping_add(index))?;
    Some((number, tables.backend(number)?))
}

/// Scales a hash to a number below `count`, without a division.
#[inline(always)]
pub fn scale(hash: u32, count: u32) -> u32 {
    ((u64::from(hash) * u64::from(count)) >> 32) as u32
}
