//! An existing flow wins: its record says how the packet is translated, and the packet says how the
//! flow is doing.

use proxy_common::tables::{Backend, FlowRecord, FlowValue, State, Work};
use proxy_common::{Family, proto};

use super::Tables;
use crate::packet::tcp;

/// Whether the packet belongs to an answered flow that still holds. The other direction's key is then
/// in the work area.
#[inline(always)]
pub fn established<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> bool {
    let Some(record) = tables.flow(&work.key) else { return false };
    record.read_other(&mut work.other);
    if !record.verified(&work.key) {
        return false;
    }
    let now = tables.now();
    if is_over(record, now, tables, work) {
        tables.remove(&work.key);
        tables.remove(&work.other);
        return false;
    }
    record.touch(now);
    (work.link, work.mtu) = way(record, tables);
    if record.state() == State::Answered as u8 {
        confirm(record, now, tables, work);
    }
    if work.packet.proto == proto::TCP {
        follow_tcp(record, now, tables, work);
    }
    true
}

/// Whether the flow has ended, so that the packet begins a new one.
#[inline(always)]
fn is_over<F: Family, T: Tables<F>>(
    record: FlowRecord<'_, F>,
    now: u32,
    tables: &T,
    work: &Work<F>,
) -> bool {
    if record.expired(now) && tables.flow(&work.other).is_none_or(|other| other.expired(now)) {
        return true;
    }
    if work.packet.proto == proto::TCP {
        // A SYN that can't be a retransmission: the port is used again.
        return work.packet.flags & (tcp::SYN | tcp::ACK) == tcp::SYN
            && (record.state() >= State::Closing as u8 || is_stale(record, tables));
    }
    // SCTP stays with its backend, as TCP does (KP-112).
    work.packet.proto == proto::UDP
        && record.flags() & FlowValue::<F>::IS_REPLY == 0
        && is_stale(record, tables)
}

/// The flow's backend, if its number has not been given to another one since.
#[inline(always)]
fn backend<F: Family, T: Tables<F>>(record: FlowRecord<'_, F>, tables: &T) -> Option<Backend<F>> {
    let backend = tables.backend(record.backend())?;
    (backend.generation == record.generation()).then_some(backend)
}

/// Whether the flow's backend has been withdrawn since it was chosen (KP-109 to 113).
#[inline(always)]
pub fn is_stale<F: Family, T: Tables<F>>(record: FlowRecord<'_, F>, tables: &T) -> bool {
    if record.service() == 0 {
        // A pod's flow out of the cluster, which has none.
        return false;
    }
    match backend(record, tables) {
        Some(backend) => backend.flags & Backend::<F>::SERVING == 0,
        None => true,
    }
}

/// The link that the packet leaves by, past the host stack, and the longest packet that passes there:
/// those that lead to the backend now, if they are known.
#[inline(always)]
pub fn way<F: Family, T: Tables<F>>(record: FlowRecord<'_, F>, tables: &T) -> (u32, u32) {
    let link = record.link();
    if link == 0 || record.flags() & FlowValue::<F>::IS_REPLY != 0 {
        return (link, 0);
    }
    match backend(record, tables) {
        Some(backend) if backend.link != 0 => (backend.link, backend.mtu.into()),
        _ => (link, 0),
    }
}

/// The client goes on after the first answer: from now on the flow counts as established.
#[inline(always)]
fn confirm<F: Family, T: Tables<F>>(
    record: FlowRecord<'_, F>,
    now: u32,
    tables: &T,
    work: &Work<F>,
) {
    if record.flags() & FlowValue::<F>::IS_REPLY != 0 {
        return;
    }
    let timeout = if work.packet.proto == proto::TCP {
        tables.setting(|s| &s.tcp_timeout)
    } else {
        tables.setting(|s| &s.udp_stream_timeout)
    };
    write_both(record, now, tables, work, (State::Established, timeout, 0));
}

/// Follows a connection's end, so that its record does not outlive it by hours. All but a few of a
/// connection's packets leave at the first lines.
#[inline(always)]
fn follow_tcp<F: Family, T: Tables<F>>(
    record: FlowRecord<'_, F>,
    now: u32,
    tables: &T,
    work: &Work<F>,
) {
    let ends = work.packet.flags & (tcp::FIN | tcp::RST);
    let flags = record.flags();
    if ends == 0 && record.state() != State::Closed as u8 {
        return;
    }
    let both = FlowValue::<F>::FIN_FORWARD | FlowValue::<F>::FIN_REPLY;
    let fins = flags & both | fin_of::<F>(ends, flags);
    let (state, timeout) = if ends & tcp::RST != 0 {
        // Not at once: the other end ignores a reset that is out of its window, and goes on.
        (State::Closed, tables.setting(|s| &s.closing_timeout))
    } else if fins == both {
        (State::Closing, tables.setting(|s| &s.closing_timeout))
    } else if fins != 0 {
        (State::HalfClosed, tables.setting(|s| &s.half_closed_timeout))
    } else {
        // As it does here.
        (State::Established, tables.setting(|s| &s.tcp_timeout))
    };
    let ends_now = state as u8 >= State::Closing as u8 && record.state() < State::Closing as u8;
    if ends_now && backend(record, tables).is_some() {
        tables.count_flow(record.backend(), false);
    }
    write_both(record, now, tables, work, (state, timeout, fins));
}

/// The flag that a FIN in this direction sets.
#[inline(always)]
fn fin_of<F: Family>(ends: u8, flags: u8) -> u8 {
    match (ends & tcp::FIN != 0, flags & FlowValue::<F>::IS_REPLY != 0) {
        (false, _) => 0,
        (true, false) => FlowValue::<F>::FIN_FORWARD,
        (true, true) => FlowValue::<F>::FIN_REPLY,
    }
}

/// Both records are told: they live and die together.
#[inline(always)]
fn write_both<F: Family, T: Tables<F>>(
    record: FlowRecord<'_, F>,
    now: u32,
    tables: &T,
    work: &Work<F>,
    news: (State, u32, u8),
) {
    write_state(record, news);
    if let Some(other) = tables.flow(&work.other) {
        other.set_seen(now);
        write_state(other, news);
    }
}

#[inline(always)]
fn write_state<F: Family>(record: FlowRecord<'_, F>, (state, timeout, fins): (State, u32, u8)) {
    record.set_state(state as u8);
    record.set_timeout(timeout);
    record.set_flags(record.flags() & FlowValue::<F>::IS_REPLY | fins);
}
