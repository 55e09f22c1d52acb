//! The story of a packet that [`super::fast`] does not deal with, step by step. A plain packet of no live flow begins with
//! `pending`: [`super::fast`] has read it, and looked for its flow.
//!
//! ```text
//! ingress, egress ──▶ send                     of a live flow
//!        └──▶ pending ──▶ send                 of one that is not live
//!                └──▶ arrive, leave ──▶ settle ──▶ send          of a new one
//! ```

use proxy_common::Outcome;
use proxy_common::tables::{
    Decision, FlowKey, FragmentValue, LastResort, Origin, Packet, Part, Request, ServiceKey,
    ServiceValue, Side, Work,
};

use super::choose::Failure;
use super::{
    Client, Leg, Next, Service, Story, Tables, Verdict, catch, direct, fast, guard, leave, live,
    open, pending, place, rewrite,
};
use crate::packet::{Frame, Wire, fragment_key, has_ports, parse, tcp};

impl From<Failure> for Next {
    #[inline(always)]
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotService | Failure::Others => Outcome::NotService.into(),
            Failure::Refused => Self::Story(Story::Refuse),
            Failure::Dropped(outcome) => outcome.into(),
        }
    }
}

/// A packet that comes in from a client's link: toward a backend, if it is for a Service. Answers of
/// masqueraded and of hairpin flows come in here too.
#[inline(always)]
pub fn ingress<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
    from: Story,
) -> Next {
    work.from = from as u32;
    if let Err(outcome) = parse(frame, Side::Ingress, &mut work.packet, &mut work.key) {
        return outcome.into();
    }
    if !has_ports(work.packet.proto) && !leave::identify(frame, tables, &work.packet, &mut work.key)
    {
        let is_icmp = work.packet.proto == F::ICMP;
        return if is_icmp { Next::Story(Story::Icmp) } else { Outcome::NotService.into() };
    }
    if work.packet.is(Part::Later) && !recall_ports(tables, &work.packet, &mut work.key) {
        return unknown_fragment(tables, &work.key).into();
    }
    live(frame, tables, work)
}

/// A packet that goes out to a client's link: back from a backend, if it belongs to a flow.
#[inline(always)]
pub fn egress<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Next {
    work.from = Story::ToClient as u32;
    if let Err(outcome) = parse(frame, Side::Egress, &mut work.packet, &mut work.key) {
        return outcome.into();
    }
    if !has_ports(work.packet.proto) && !leave::identify(frame, tables, &work.packet, &mut work.key)
    {
        let is_icmp = work.packet.proto == F::ICMP;
        return if is_icmp { Next::Story(Story::Icmp) } else { Outcome::NotService.into() };
    }
    if work.packet.is(Part::Later) && !recall_ports(tables, &work.packet, &mut work.key) {
        return Outcome::NotService.into();
    }
    live(frame, tables, work)
}

/// A live flow's packet is sent; of any other flow more must be known.
#[inline(always)]
fn live<F: Wire, P: Frame, T: Tables<F>>(frame: &P, tables: &T, work: &mut Work<F>) -> Next {
    let Work { key, other, memory, packet, .. } = work;
    match live::find(tables, packet, (key, other), memory, frame.length()) {
        Some(decision) => decide(work, decision),
        None => Next::Story(Story::Pending),
    }
}

/// A packet of a flow that is not live, or of a new one.
#[inline(always)]
pub fn pending<F: Wire, P: Frame, T: Tables<F>>(frame: &P, tables: &T, work: &mut Work<F>) -> Next {
    let Work { key, other, memory, packet, .. } = work;
    match pending::find(frame, tables, packet, (key, other), memory) {
        Some(pending::Found::Ours(decision)) => decide(work, decision),
        Some(pending::Found::Foreign) => Outcome::NotService.into(),
        None if work.key.side == Side::Egress as u8 => Next::Story(Story::Leave),
        None => Next::Story(Story::Arrive),
    }
}

#[inline(always)]
fn decide<F: Wire>(work: &mut Work<F>, decision: Decision) -> Next {
    work.decision = decision;
    Next::Story(Story::Send)
}

/// A flow that begins at ingress: its backend is chosen.
#[inline(always)]
pub fn arrive<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Next {
    let client = if work.from == Story::FromPod as u32 { Client::Pod } else { Client::Outside };
    let Work { key, other, memory, packet, .. } = work;
    let Some(mark) = tables.service(&ServiceKey::mark(key.dst)) else {
        if let Some(opening) = direct::open(tables, packet, (key, other), memory) {
            return ask(tables, work, opening);
        }
        if client == Client::Outside {
            leave::admit(tables, packet, (key, other), memory);
        }
        return Outcome::NotService.into();
    };
    if mark.has(ServiceValue::LOOPBACK)
        || !has_ports(packet.proto)
        || catch::has(tables, packet, key, memory)
    {
        return Outcome::NotService.into();
    }
    match open::open(frame, tables, packet, (key, other), memory, (&mark, client)) {
        Ok(_) if client == Client::Outside && guard::evades(frame, tables, packet) => {
            Outcome::Silent.into()
        }
        Ok(opening) => ask(tables, work, opening),
        Err(Failure::NotService) if client == Client::Outside && returns(frame, &mark, key) => {
            Failure::Refused.into()
        }
        Err(failure) => failure.into(),
    }
}

/// Whether the host would send a packet back out of the link that it came by: a VIP that routers lead here, at a port
/// that it has not, would go round until its hops are used up.
#[inline(always)]
fn returns<F: Wire, P: Frame>(frame: &P, mark: &Service, key: &FlowKey<F>) -> bool {
    !mark.has(ServiceValue::NODE) && frame.route::<F>(&key.src, &key.dst).link == frame.link()
}

/// A flow that begins at egress, if it is to be translated.
#[inline(always)]
pub fn leave<F: Wire, P: Frame, T: Tables<F>>(frame: &P, tables: &T, work: &mut Work<F>) -> Next {
    let Work { key, other, memory, packet, .. } = work;
    match leave::open(frame, tables, packet, (key, other), memory) {
        Ok(opening) => ask(tables, work, opening),
        Err(failure) => {
            if failure == Failure::NotService && tcp::opens(packet.flags) {
                // A flow of ours has ended here, and this is another one.
                pending::disown(tables, key, memory);
            }
            failure.into()
        }
    }
}

/// Asks for a place for a new flow's answers; the one that is wanted is in `work.other`.
#[inline(always)]
fn ask<F: Wire, T: Tables<F>>(
    tables: &T,
    work: &mut Work<F>,
    open::Opening { origin, service, backend, masquerades }: open::Opening,
) -> Next {
    work.decision = Decision::new(Outcome::Opened, origin);
    work.request = Request {
        hash: work.key.hash(tables.setting(|s| &s.seed)),
        now: tables.now(),
        microseconds: tables.microseconds(),
        attempts: 0,
        masquerades: masquerades.into(),
        service,
        backend,
        last_resort: LastResort { since: 0, port: 0 },
    };
    Next::Story(Story::Settle)
}

/// A new flow gets a place, or some are looked at and it is asked again.
#[inline(always)]
pub fn settle<F: Wire, P: Frame, T: Tables<F>>(frame: &P, tables: &T, work: &mut Work<F>) -> Next {
    let Work { key, other, memory, request, .. } = work;
    let origin = work.decision.origin();
    match place::take(frame, tables, (key, &mut *other), memory, request, origin) {
        place::Answer::Taken => {}
        place::Answer::AskAgain => return Next::Story(Story::Settle),
        place::Answer::None => return Outcome::NoPort.into(),
    }
    if other.side == Side::Ingress as u8 {
        // Its answers come in for the node, or for a VIP. Its own packets are looked at though pods are no longer masqueraded.
        tables.take_port(other.dport);
        if key.side == Side::Egress as u8 {
            tables.take_port(key.sport);
        }
    }
    let entered = place::enter(tables, (key, other), memory, origin, request);
    if entered == origin {
        open::count(tables, origin, request.service, frame.length());
    }
    decide(work, Decision::new(Outcome::Opened, entered))
}

/// Translates the packet and says which way it goes.
#[inline(always)]
pub fn send<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Next {
    let (packet, origin) = (&work.packet, work.decision.origin());
    let keys = (&work.key, &work.other);
    let mut leg = Leg::NONE;
    if origin.answers_outside() {
        leg = live::way_back(frame, tables, keys, &mut work.memory.spare);
    } else if origin.may_be_shortened() {
        live::note_way(frame, tables, keys, &mut work.memory.spare);
    }
    let (part, outcome) = match packet.part {
        0 => (Part::Whole, work.decision.outcome()),
        1 => {
            let ports = FragmentValue { sport: work.key.sport, dport: work.key.dport };
            tables.remember_fragment(&fragment_key(packet, &work.key), ports);
            (Part::First, work.decision.outcome())
        }
        _ => (Part::Later, Outcome::Fragment),
    };
    let (l4, number) = (packet.l4(), packet.proto);
    if work.key.side == Side::Egress as u8 {
        frame.set_done();
    } else if work.from == Story::FromPod as u32 && fast::ends_here(tables, &work.key, origin) {
        frame.set_passed();
    }
    match rewrite::translate(frame, l4, number, part, &work.key, &work.other) {
        Some(()) if origin.is(Origin::TURN) => {
            Next::Done(Verdict::back(tables, &work.key, rewrite::turn(frame)))
        }
        Some(()) => Next::Done(rewrite::send::<F, P>(frame, origin, leg, outcome)),
        None => Outcome::NotWritable.into(),
    }
}

/// Gives a later fragment the ports of its datagram. False if they are not known.
#[inline(always)]
fn recall_ports<F: Wire, T: Tables<F>>(tables: &T, packet: &Packet, key: &mut FlowKey<F>) -> bool {
    match tables.fragment(&fragment_key(packet, key)) {
        Some(FragmentValue { sport, dport }) => {
            (key.sport, key.dport) = (sport, dport);
            true
        }
        None => false,
    }
}

/// A fragment whose first was not seen. To a VIP it can go nowhere: no backend knows its datagram. To
/// the node itself it may be for a socket.
#[inline(always)]
fn unknown_fragment<F: Wire, T: Tables<F>>(tables: &T, key: &FlowKey<F>) -> Outcome {
    match tables.service(&ServiceKey::mark(key.dst)) {
        Some(mark) if !mark.has(ServiceValue::NODE) => Outcome::FragmentUnknown,
        _ => Outcome::NotService,
    }
}
