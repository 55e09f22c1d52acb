//! Pods that talk to someone outside the cluster, with the node's address in the place of their own
//! (`--masquerade-pods`): at egress of the uplink that the host stack has chosen. Such a flow has no
//! Service, number 0, and no backend.

use proxy_common::tables::{Part, Side, Work};
use proxy_common::{Family, Outcome, Port, proto};

use super::choose::{self, Failure};
use super::{Tables, open};
use crate::packet::{Frame, Wire, has_ports, tcp};

/// The flow in the making that a pod's packet belongs to, or a new one. The other direction's key is then
/// in the work area.
///
/// # Errors
/// [`Failure::NotService`] if the packet is not to be masqueraded; or says why it can't be.
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    link: u32,
) -> Result<Outcome, Failure> {
    if tables.setting(|s| &s.masquerade_pods) == 0 || !tables.is_pod(&work.key.src) {
        return Err(Failure::NotService);
    }
    // Only a SYN opens a connection: all else of TCP that has no record is not ours.
    if work.packet.proto == proto::TCP && work.packet.flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        return Err(Failure::NotService);
    }
    let Some(exit) = tables.exit(link) else { return Err(Failure::NotService) };
    // The ranges left alone are those of no Service.
    work.range = choose::source_range(0, work.key.dst);
    if tables.is_in_range(&work.range) {
        return Err(Failure::NotService);
    }
    if open::embryo(tables, work) {
        return Ok(Outcome::Forwarded);
    }
    open::leave(tables, work, exit)?;
    Ok(Outcome::Opened)
}

/// Notes a datagram that comes in for a pod by its own address, so that its answer goes out as it is: with
/// TCP an answer shows, with others it must be known.
#[inline(always)]
pub fn admit<F: Family, T: Tables<F>>(tables: &T, work: &mut Work<F>) {
    let is_asked = tables.setting(|s| &s.masquerade_pods) != 0
        && work.packet.proto != proto::TCP
        && has_ports(work.packet.proto)
        && tables.is_pod(&work.key.dst);
    if is_asked {
        open::admit(tables, work);
    }
}

/// Whether the packet's flow is one that was only noted by [`admit`]: it keeps its source.
#[inline(always)]
pub fn is_admitted<F: Family>(work: &Work<F>) -> bool {
    work.other.dst == work.key.src && work.other.dport == work.key.sport
}

/// Gives an ICMP echo of a masqueraded flow ports: its identifier stands for the pod's. False if it is no
/// echo of that direction: requests go out, and their answers come in.
#[inline(always)]
pub fn identify<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> bool {
    if work.packet.proto != F::ICMP || tables.setting(|s| &s.masquerade_pods) == 0 {
        return false;
    }
    if work.packet.is(Part::Later) {
        return true;
    }
    let [request, reply] = F::ECHO;
    let Some([kind, code]) = frame.load::<[u8; 2]>(work.packet.l4()) else { return false };
    let Some(id) = frame.load::<Port>(work.packet.l4() + F::ECHO_ID) else { return false };
    if work.key.side == Side::Egress as u8 {
        work.key.sport = id;
        [kind, code] == [request, 0]
    } else {
        work.key.dport = id;
        [kind, code] == [reply, 0]
    }
}
