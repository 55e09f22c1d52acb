//! The two stories of a packet.

use proxy_common::tables::{FlowValue, FragmentValue, Part, ServiceKey, ServiceValue, Side, Work};
use proxy_common::{Family, Outcome};

use super::choose::Failure;
use super::{Client, Tables, flow, icmp, leave, open, refuse, rewrite};
use crate::packet::{Frame, Wire, fragment_key, has_ports, parse};

/// A packet that comes in from a client's link: toward a backend, if it is for a Service. Answers of
/// masqueraded and of hairpin flows come in here too.
#[inline(always)]
pub fn ingress<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
    client: Client,
) -> Outcome {
    if let Err(outcome) = parse(frame, Side::Ingress, &mut work.packet, &mut work.key) {
        return outcome;
    }
    if !leave::identify(frame, tables, work) {
        if work.packet.proto == F::ICMP {
            return icmp::inbound(frame, tables, work);
        }
        if !has_ports(work.packet.proto) {
            return Outcome::NotService;
        }
    }
    if work.packet.is(Part::Later) && !recall_ports(tables, work) {
        return unknown_fragment(tables, work);
    }
    match flow_of(tables, work, client, frame.link()) {
        Ok(outcome) => send_on(frame, tables, work, outcome),
        Err(Failure::NotService) => Outcome::NotService,
        Err(Failure::Refused) => refuse::refuse(frame, work),
        Err(Failure::Dropped(outcome)) => outcome,
    }
}

/// The flow that the packet belongs to: one that was answered, one in the making, or a new one.
#[inline(always)]
fn flow_of<F: Family, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    client: Client,
    link: u32,
) -> Result<Outcome, Failure> {
    if flow::established(tables, work) {
        return Ok(Outcome::Forwarded);
    }
    let Some(mark) = tables.service(&ServiceKey::mark(work.key.dst)) else {
        if client == Client::Outside {
            leave::admit(tables, work);
        }
        return Err(Failure::NotService);
    };
    match open::promote(tables, work) {
        Some(outcome) => Ok(outcome),
        None if mark.has(ServiceValue::LOOPBACK) || !has_ports(work.packet.proto) => {
            Err(Failure::NotService)
        }
        None => open::open(tables, work, &mark, client, link),
    }
}

/// As [`pass_on`], unless the packet is too long for the flow's own link.
#[inline(always)]
fn send_on<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &Work<F>,
    outcome: Outcome,
) -> Outcome {
    if work.link != 0 && refuse::is_too_big(frame, work) {
        return refuse::too_big(frame, work);
    }
    pass_on(frame, tables, work, outcome)
}

/// A packet that goes out to a client's link: back from a backend, if it belongs to a flow.
#[inline(always)]
pub fn egress<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Outcome {
    if let Err(outcome) = parse(frame, Side::Egress, &mut work.packet, &mut work.key) {
        return outcome;
    }
    if !leave::identify(frame, tables, work) {
        if work.packet.proto == F::ICMP {
            return icmp::error(frame, tables, work);
        }
        if !has_ports(work.packet.proto) {
            return Outcome::NotService;
        }
    }
    if work.packet.is(Part::Later) && !recall_ports(tables, work) {
        return Outcome::NotService;
    }
    let outcome = if flow::established(tables, work) {
        Outcome::Replied
    } else {
        match open::promote(tables, work) {
            // Nothing of it is translated: it goes on as if nobody had looked.
            Some(Outcome::TableFull) if leave::is_admitted(work) => return Outcome::NotService,
            Some(outcome) => outcome,
            None => match leave::open(tables, work, frame.link()) {
                Ok(outcome) => outcome,
                Err(Failure::Dropped(outcome)) => return outcome,
                Err(Failure::NotService | Failure::Refused) => return Outcome::NotService,
            },
        }
    };
    pass_on(frame, tables, work, outcome)
}

/// Translates the packet and says which way it goes: on; or by the flow's own link; or, when the other
/// direction is seen on the same side of the same link, back to the pod it came from.
#[inline(always)]
fn pass_on<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &Work<F>,
    outcome: Outcome,
) -> Outcome {
    if outcome == Outcome::TableFull {
        return outcome;
    }
    if work.packet.is(Part::First) {
        let ports = FragmentValue { sport: work.key.sport, dport: work.key.dport };
        tables.remember_fragment(&fragment_key(&work.packet, &work.key), ports);
    }
    // Unknown to the verifier from here on: what follows is verified once, not for each outcome.
    let outcome = core::hint::black_box(outcome);
    if rewrite::translate(frame, work).is_none() {
        return Outcome::NotWritable;
    }
    if work.link == FlowValue::<F>::BY_STACK {
        return outcome;
    }
    if work.link != 0 {
        return match F::hop(frame, P::NETWORK) {
            Some(()) => Outcome::Masqueraded,
            None => Outcome::NotWritable,
        };
    }
    if work.other.side == work.key.side {
        return match rewrite::turn_around(frame) {
            Some(()) => Outcome::Hairpin,
            None => Outcome::NotWritable,
        };
    }
    if work.packet.is(Part::Later) { Outcome::Fragment } else { outcome }
}

/// Gives a later fragment the ports of its datagram. False if they are not known.
#[inline(always)]
fn recall_ports<F: Wire, T: Tables<F>>(tables: &T, work: &mut Work<F>) -> bool {
    match tables.fragment(&fragment_key(&work.packet, &work.key)) {
        Some(FragmentValue { sport, dport }) => {
            (work.key.sport, work.key.dport) = (sport, dport);
            true
        }
        None => false,
    }
}

/// A fragment whose first was not seen. To a VIP it can go nowhere: no backend knows its datagram. To
/// the node itself it may be for a socket.
#[inline(always)]
fn unknown_fragment<F: Wire, T: Tables<F>>(tables: &T, work: &Work<F>) -> Outcome {
    match tables.service(&ServiceKey::mark(work.key.dst)) {
        Some(mark) if !mark.has(ServiceValue::NODE) => Outcome::FragmentUnknown,
        _ => Outcome::NotService,
    }
}
