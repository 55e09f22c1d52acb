//! A short cut past the host stack, made of what is known of a flow that goes by it.

use super::flow::{FlowKey, FlowValue, Origin, Side, expired, tag};
use super::state::State;
use crate::Family;

/// The two records that take a short cut: what they are to be instead of what they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShortCut<F: Family> {
    /// Of the client's packets, as they come in.
    pub asked: (FlowKey<F>, FlowValue<F>),
    /// Of the backend's, as they come in.
    pub answered: (FlowKey<F>, FlowValue<F>),
    /// The link by which the host stack lets the client's packets leave.
    pub link: u32,
}

impl<F: Family> ShortCut<F> {
    /// The short cut of the flow whose client's packets leave under the key `leaving`, as masqueraded there. `None` if it may
    /// not have one: it must be established, and known in all four places, in both directions; nothing but the two
    /// translations may be done to it on its way; the host stack must have let its last packets pass; and no policy may have led them.
    /// `None` too if it has one already.
    pub fn of(
        leaving: FlowKey<F>,
        record: impl Fn(&FlowKey<F>) -> Option<FlowValue<F>>,
    ) -> Option<Self> {
        let there = record(&leaving)?;
        let answered = there.other;
        let back = record(&answered)?;
        let returning = leaving.turned(Side::Egress);
        let home = record(&returning)?;
        let asked = home.other;
        let first = record(&asked)?;
        let origin = first.facts().origin;
        let is_whole = back.other_by_stack(&answered) == leaving
            && first.other_by_stack(&asked) == returning
            && [&there, &back, &home, &first]
                .iter()
                .all(|value| value.state == State::Established as u8);
        let is_plain = (asked.src, asked.sport) == (leaving.src, leaving.sport)
            && origin.is(Origin::MASQUERADES)
            && origin.client_link != 0
            && there.marked == 0
            && home.marked == 0;
        let is_known = there.link != 0 && home.link != 0;
        // What came in last has left too: the host stack lets it pass still.
        let passes = |came: &FlowValue<F>, left: &FlowValue<F>| !expired(left.seen, 0, came.seen);
        let is_passing = passes(&first, &there) && passes(&back, &home);
        let has_one = first.facts().is_cut() && back.facts().is_cut();
        (is_whole && is_plain && is_known && is_passing && !has_one).then(|| Self {
            asked: (asked, led(&first, &asked, &answered, origin)),
            answered: (
                answered,
                FlowValue { link: home.link, ..led(&back, &answered, &asked, origin.inverse()) },
            ),
            link: there.link,
        })
    }
}

/// A record whose packets take the short cut to `other`'s end.
fn led<F: Family>(
    value: &FlowValue<F>,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
    origin: Origin,
) -> FlowValue<F> {
    let origin = origin.shortened();
    let Origin { backend, client_link, generation, kind } = origin;
    let tag = tag(key, other, origin);
    // The next packet goes by the stack, and looks whether the last did.
    let seen = value.seen.wrapping_sub(1);
    FlowValue { other: *other, tag, backend, client_link, generation, kind, seen, ..*value }
}
