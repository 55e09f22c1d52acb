//! Every packet. A stranger's is left alone, which mostly some bits tell; a plain one in the middle of a live flow takes one
//! look-up and is translated; all else is for the stories.
//!
//! What happens once a second or four, or seldom, is not done here: then the story does what this would have
//! done, and the rest. That goes for counting, too: what is translated here is counted in the flow's record
//! only, and a story hands that over.

use bytemuck::Zeroable;
use proxy_common::tables::{
    Facts, FlowKey, FlowRecord, Kind, Kinds, Origin, ServiceKey, ServiceValue, Side, State, Work,
};
use proxy_common::{Family, Outcome, proto};

use super::interest::{self, Ends};
use super::{Client, Leg, Next, Story, Tables, live, rewrite};
use crate::packet::{Frame, Plain, Wire, tcp};

/// For how many ticks at most a connection of a pod's that goes on is left alone by the stories: as long what its record has counted
/// may stay there, and the other direction's record may be missing if it was lost.
pub const PATIENCE: u32 = 4;

/// A packet that comes in from a client's link.
#[inline(always)]
pub fn ingress<'w, F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    client: Client,
    work: impl FnOnce() -> Option<&'w mut Work<F>>,
) -> Next {
    frame.forget_notes();
    let Some((plain, key)) = F::plain(frame, Side::Ingress) else {
        return Next::Story(client.story());
    };
    let Some(to) = interest::comes_in(tables, plain, &key, client) else {
        return Outcome::NotService.into();
    };
    if let Some(next) = established(frame, tables, plain, &key, client.story()) {
        return next;
    }
    if is_anyones(tables, plain, (&key, to), client) {
        hand_over::<F, P>(plain, &key, client.story(), work)
    } else {
        Outcome::NotService.into()
    }
}

/// A packet that goes out to a client's link.
#[inline(always)]
pub fn egress<'w, F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    client: Client,
    work: impl FnOnce() -> Option<&'w mut Work<F>>,
) -> Next {
    if frame.is_done() {
        return Outcome::NotService.into();
    }
    let Some((plain, key)) = F::plain(frame, Side::Egress) else {
        return Next::Story(Story::ToClient);
    };
    let Some(ends) = interest::goes_out(frame, tables, &key, client) else {
        return Outcome::NotService.into();
    };
    if let Some(next) = established(frame, tables, plain, &key, Story::ToClient) {
        return next;
    }
    let is_anyones = match pending(tables, plain, &key) {
        Known::Translated => true,
        // In the middle of a connection that nobody knows of nothing begins.
        Known::No => client == Client::Outside && leaves(frame, tables, plain, (&key, ends)),
        Known::Foreign => false,
    };
    if is_anyones {
        hand_over::<F, P>(plain, &key, Story::ToClient, work)
    } else {
        Outcome::NotService.into()
    }
}

/// A packet of no live flow is a story's. What was read of it is handed over: there is nothing to be parsed and looked up again.
#[inline(always)]
fn hand_over<'w, F: Wire, P: Frame>(
    plain: Plain,
    key: &FlowKey<F>,
    from: Story,
    work: impl FnOnce() -> Option<&'w mut Work<F>>,
) -> Next {
    let Some(work) = work() else { return Outcome::NotService.into() };
    work.key = *key;
    work.packet = plain.packet::<F, P>();
    work.from = from as u32;
    Next::Story(Story::Pending)
}

/// Whether a packet of an unknown flow that leaves by an uplink may be one to be masqueraded, a Service's or a pod's; or goes
/// to a VIP untranslated; or is of the node's own flow, which is noted. What goes out to a pod of this node is neither.
#[inline(always)]
fn leaves<F: Family, P: Frame, T: Tables<F>>(
    frame: &P,
    tables: &T,
    plain: Plain,
    (key, ends): (&FlowKey<F>, Ends),
) -> bool {
    if frame.is_led() {
        return true;
    }
    plain.begins()
        && (ends.is_pods
            || ends.from.has(Kind::Node)
            || ends.to.has(Kind::Frontend)
            || tables
                .embryo(&key.turned(Side::Egress))
                .is_some_and(|answers| answers.common().may_be_masqueraded()))
}

/// What is known of a flow that is not live.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Nothing.
    No,
    /// It is none of ours.
    Foreign,
    /// It is to be translated.
    Translated,
}

/// Translates the packet, if it is in the middle of a live flow and nothing else is to be done. `None` if
/// there is no such flow.
#[inline(always)]
fn established<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    plain: Plain,
    key: &FlowKey<F>,
    story: Story,
) -> Option<Next> {
    // Asked for before there is a record whose fields would have to be put aside for it.
    let now = tables.now();
    let record = tables.flow(key)?;
    let mut other = FlowKey::zeroed();
    let Some(facts) = record.read_plain(key, &mut other) else {
        return Some(Next::Story(story));
    };
    let origin = facts.plain;
    if !is_in_the_middle(facts, plain) || is_due(facts, plain, now, story) {
        return Some(Next::Story(story));
    }
    // What is done for flows that are not seen here is not in this program, which must be small.
    let not_here = match story {
        Story::FromPod => Origin::SHORT_CUT,
        Story::ToClient => Origin::SHORT_CUT | Origin::TURN,
        _ => Origin::TURN,
    };
    if origin.is(not_here) {
        return Some(Next::Story(story));
    }
    if plain.is(proto::UDP) && live::is_stale(origin, tables) {
        return Some(Next::Story(story));
    }
    let Some(leg) = leg(tables, record, facts, story, &other) else {
        return Some(Next::Story(story));
    };
    let l4 = P::NETWORK + F::HEADER;
    if facts.is_cut() && rewrite::is_too_big::<F, P>(frame, l4, key.proto, leg.mtu) {
        // The host stack knows what to do.
        return Some(Next::Story(story));
    }
    let Some(change) = rewrite::Change::of(key, &other) else { return Some(Next::Story(story)) };
    if record.count(frame.length()).is_none() {
        return Some(Next::Story(story));
    }
    record.touch(now);
    if rewrite::translate_plain(frame, plain, &other, &change).is_none() {
        return Some(Outcome::NotWritable.into());
    }
    if story == Story::ToClient {
        frame.set_done();
    } else if story == Story::FromPod && ends_here(tables, key, origin) {
        frame.set_passed();
    }
    match rewrite::send::<F, P>(frame, origin, leg, origin.translated()) {
        verdict if verdict.outcome == Outcome::NotWritable => Some(Next::Done(verdict)),
        verdict => Some(Next::Counted(verdict)),
    }
}

/// Whether a packet is one in the middle of a live flow: then there is nothing else to do than to translate it, if nothing is due.
#[inline(always)]
pub(super) fn is_in_the_middle(facts: Facts, plain: Plain) -> bool {
    facts.is_in(State::Established) && !plain.has(tcp::SYN | tcp::FIN | tcp::RST)
}

/// Whether a story is to look after the flow again: once a tick where the host stack chooses its way, which may become another
/// one; else in [`PATIENCE`] ticks. Not by two branches: LLVM would make all that follows twice.
#[inline(always)]
fn is_due(facts: Facts, plain: Plain, now: u32, story: Story) -> bool {
    let origin = facts.plain;
    // Datagrams may have to be given up after a second.
    let is_led = story == Story::FromOutside
        || !plain.is(proto::TCP)
        || origin.answers_outside()
        || origin.may_be_shortened()
        || facts.is_cut();
    let pause = if is_led { 0 } else { PATIENCE.trailing_zeros() };
    facts.seen >> pause != now >> pause
}

/// Whether a pod's packet that is translated where it comes in needs nothing where it goes out. Of TCP: two pods that send each
/// other datagrams by VIPs, from and to one port, have one flow where they end.
#[inline(always)]
pub(super) fn ends_here<F: Family, T: Tables<F>>(
    tables: &T,
    key: &FlowKey<F>,
    origin: Origin,
) -> bool {
    key.proto == proto::TCP
        && !origin.is(Origin::MASQUERADES | Origin::TURN)
        && tables.setting(|s| &s.masquerade_pods) == 0
}

/// How a translated packet leaves. `None` if that is to be found out.
#[inline(always)]
pub(super) fn leg<F: Family, T: Tables<F>>(
    tables: &T,
    record: FlowRecord<'_, F>,
    facts: Facts,
    story: Story,
    other: &FlowKey<F>,
) -> Option<Leg> {
    let origin = facts.plain;
    // Where pods' packets come in are no answers to anyone outside.
    if story == Story::FromPod || !(origin.answers_outside() || facts.is_cut()) {
        return Some(Leg::NONE);
    }
    let leg = if origin.is(Origin::REPLY) {
        Leg { link: facts.link, mtu: record.mtu(), way: 0 }
    } else {
        live::way(origin, tables, other.src)
    };
    (leg.link != 0).then_some(leg)
}

/// Whether a packet of no live flow may be for a Service, or the answer to a flow that is not live.
#[inline(always)]
fn is_anyones<F: Family, T: Tables<F>>(
    tables: &T,
    plain: Plain,
    (key, to): (&FlowKey<F>, Kinds),
    client: Client,
) -> bool {
    let may_be_marked = to.has(Kind::Frontend) || to.has(Kind::Node);
    let mark = if may_be_marked { tables.service(&ServiceKey::mark(key.dst)) } else { None };
    let is_node = mark.is_some_and(|mark| mark.has(ServiceValue::NODE));
    if mark.is_some() && !is_node {
        return true;
    }
    if !is_node && !to.has(Kind::Endpoint) {
        return interest::is_admitted(tables, plain, client);
    }
    match pending(tables, plain, key) {
        Known::Translated => true,
        Known::Foreign => false,
        // Whether it is one that counts here, the story sees.
        Known::No if is_node => {
            tables.has_service(&ServiceKey::new(key.dst, key.dport, key.proto))
                || tables.has_service(&ServiceKey::node_port(key.dport, key.proto))
        }
        // One to an endpoint by its own address.
        Known::No => plain.begins(),
    }
}

/// What is known of the packet's flow among those that are not live. A foreign one is kept in mind as long
/// as it goes on.
#[inline(always)]
fn pending<F: Family, T: Tables<F>>(tables: &T, plain: Plain, key: &FlowKey<F>) -> Known {
    let Some(record) = tables.embryo(key) else { return Known::No };
    let mut other = FlowKey::zeroed();
    let Some((facts, _)) = record.read(key, &mut other) else { return Known::No };
    if !facts.is_in(State::Foreign) {
        return Known::Translated;
    }
    let now = tables.now();
    if plain.begins() && facts.expired(live::lifetime(tables, key.proto, facts.state), now) {
        return Known::No;
    }
    if facts.seen != now {
        record.common().touch(now);
    }
    Known::Foreign
}
