//! Records of flows where they lie: in the maps, which other CPUs change meanwhile.

use core::marker::PhantomData;
use core::ptr::NonNull;

use super::flow::{EmbryoValue, Facts, FlowKey, FlowValue, Making, Origin, expired, tag};
use super::state::State;
use crate::Family;

/// A record in its map, read and written in place.
///
/// Other CPUs and the kernel's own reuse of deleted elements may change it at any time. So it is read
/// as a whole by [`FlowRecord::read`], which verifies what it has read, and written to only soon after that.
/// Should the element change hands in the nanoseconds between, a stranger's record gets a wrong `seen`,
/// `state` or count of its own direction, which cost it nothing but a way through the slower program; or a wrong link, by which
/// answers leave until the next tick.
#[derive(Clone, Copy)]
pub struct FlowRecord<'a, F: Family> {
    value: NonNull<FlowValue<F>>,
    table: PhantomData<&'a FlowValue<F>>,
}

/// As [`FlowRecord`], of a flow that is not live.
#[derive(Clone, Copy)]
pub struct EmbryoRecord<'a, F: Family> {
    value: NonNull<EmbryoValue<F>>,
    table: PhantomData<&'a EmbryoValue<F>>,
}

macro_rules! load {
    ($record:expr, $field:ident) => {{
        // SAFETY: `new`'s caller promised that the pointer stays readable for the record's lifetime;
        // any bytes are a valid value of a Pod type. Volatile, since it is shared memory.
        unsafe { (&raw const (*$record.value.as_ptr()).$field).read_volatile() }
    }};
}

macro_rules! store {
    ($record:expr, $field:ident, $value:expr) => {{
        let value = $value;
        // SAFETY: as for reading; the maps are shared memory, where racing stores of one word are the
        // accepted way to update.
        unsafe { (&raw mut (*$record.value.as_ptr()).$field).write_volatile(value) }
    }};
}

impl<F: Family> FlowRecord<'_, F> {
    /// A record at `value`.
    ///
    /// # Safety
    /// The memory must stay readable and writable for the record's lifetime and may only be accessed
    /// through such records meanwhile.
    #[inline(always)]
    pub const unsafe fn new(value: NonNull<FlowValue<F>>) -> Self {
        Self { value, table: PhantomData }
    }

    /// Reads the record that was found under `key`, the other direction's key into `other`: both as they are of a packet that
    /// goes by the host stack. `None` if it is another's by now.
    #[inline(always)]
    pub fn read(&self, key: &FlowKey<F>, other: &mut FlowKey<F>) -> Option<Facts> {
        let facts = self.read_plain(key, other)?;
        if facts.is_cut() {
            other.lead_by_stack(key);
        }
        Some(Facts { origin: facts.plain.by_stack(), ..facts })
    }

    /// As [`FlowRecord::read`], with the other direction's key as it is of a plain packet, and that packet's part only.
    #[inline(always)]
    pub fn read_plain(&self, key: &FlowKey<F>, other: &mut FlowKey<F>) -> Option<Facts> {
        for (position, word) in other.words_mut().iter_mut().enumerate() {
            *word = self.word(position);
        }
        let [vouched, backend] = bytemuck::cast(self.word(FlowKey::<F>::WORDS));
        let [client_link, rest]: [u32; 2] = bytemuck::cast(self.word(FlowKey::<F>::WORDS + 1));
        let [low, high, kind, state] = rest.to_ne_bytes();
        let origin =
            Origin { backend, client_link, generation: u16::from_ne_bytes([low, high]), kind };
        let [seen, link] = bytemuck::cast(self.word(FlowKey::<F>::WORDS + 3));
        let facts = Facts { origin, plain: origin, state: State::of(state), seen, link };
        (vouched == tag(key, other, origin)).then_some(facts)
    }

    /// Where the word of that number lies: first the other direction's key, then tag and backend, then the rest of
    /// what never changes with the state, then packets and bytes, then `seen` and the link.
    #[inline(always)]
    const fn place(&self, position: usize) -> *mut u64 {
        // SAFETY: a record begins with more words than are asked for, as is asserted where it is laid out.
        unsafe { self.value.as_ptr().cast::<u64>().add(position) }
    }

    #[inline(always)]
    fn word(&self, position: usize) -> u64 {
        // SAFETY: `new`'s caller promised that the record stays readable for 'a; it is aligned to words.
        // Volatile, since it is shared memory.
        unsafe { self.place(position).read_volatile() }
    }

    /// Notes that the record was used.
    #[inline(always)]
    pub fn touch(&self, now: u32) {
        store!(self, seen, now);
    }

    /// Notes by which link its packets leave.
    #[inline(always)]
    pub fn set_link(&self, link: u32) {
        store!(self, link, link);
    }

    /// Notes whether a policy of the host's led its packets when they left, which no short cut would follow.
    #[inline(always)]
    pub fn set_marked(&self, is_marked: bool) {
        store!(self, marked, u16::from(is_marked));
    }

    /// Whether a policy of the host's led its packets when they left.
    #[inline(always)]
    pub fn is_marked(&self) -> bool {
        load!(self, marked) != 0
    }

    /// The longest IP packet that a short cut to the client takes; 0 if that is not known.
    #[inline(always)]
    pub fn mtu(&self) -> u32 {
        load!(self, mtu).into()
    }

    /// Whether a short cut may be asked for. If so, it may again after `pause` ticks.
    #[inline(always)]
    pub fn may_ask(&self, now: u32, pause: u32) -> bool {
        let may = !expired(now, 0, load!(self, ask_at));
        if may {
            store!(self, ask_at, now.wrapping_add(pause));
        }
        may
    }

    /// Notes that no short cut is to be asked for before then.
    #[inline(always)]
    pub fn ask_later(&self, when: u32) {
        store!(self, ask_at, when);
    }

    /// Whether the other direction's key is that one, as it is of a plain packet.
    #[inline(always)]
    pub fn leads_to(&self, other: &FlowKey<F>) -> bool {
        let words = other.words().iter().enumerate();
        words.fold(true, |is_same, (position, word)| is_same & (self.word(position) == *word))
    }

    /// Whether it may be of a flow that is masqueraded where it leaves: a hint, for which nothing is verified.
    #[inline(always)]
    pub fn may_be_masqueraded(&self) -> bool {
        load!(self, kind) & Origin::MASQUERADES != 0
    }

    /// Notes how far the record's direction has come.
    #[inline(always)]
    pub fn set_state(&self, state: State) {
        store!(self, state, state as u8);
    }

    /// Counts a packet of the record's direction. `None` if so many bytes were counted that they should be taken
    /// before more come: then it is not counted.
    #[inline(always)]
    pub fn count(&self, bytes: u32) -> Option<()> {
        let counts = FlowKey::<F>::WORDS + 2;
        let before = self.word(counts);
        let [_, counted]: [u32; 2] = bytemuck::cast(before);
        if is_large(counted) {
            return None;
        }
        let more: u64 = bytemuck::cast([1, bytes]);
        // SAFETY: as for `word`. Two at once may count one less.
        unsafe { self.place(counts).write_volatile(before.wrapping_add(more)) };
        Some(())
    }

    /// Takes the packets and bytes that were counted.
    #[inline(always)]
    pub fn take_counts(&self) -> (u32, u32) {
        let counts = (load!(self, packets), load!(self, bytes));
        store!(self, packets, 0);
        store!(self, bytes, 0);
        counts
    }

    /// Whether so many bytes were counted that they should be taken before more come.
    #[inline(always)]
    pub fn is_count_large(&self) -> bool {
        is_large(load!(self, bytes))
    }
}

/// Whether a count of bytes has half of its range behind it: the longest packet is far from the rest.
#[inline(always)]
const fn is_large(bytes: u32) -> bool {
    bytes >> 31 != 0
}

impl<'a, F: Family> EmbryoRecord<'a, F> {
    /// A record at `value`.
    ///
    /// # Safety
    /// As for [`FlowRecord::new`].
    #[inline(always)]
    pub const unsafe fn new(value: NonNull<EmbryoValue<F>>) -> Self {
        Self { value, table: PhantomData }
    }

    /// The part that is as a live flow's.
    #[inline(always)]
    pub const fn common(&self) -> FlowRecord<'a, F> {
        FlowRecord { value: self.value.cast(), table: PhantomData }
    }

    /// As [`FlowRecord::read`], with the rest.
    #[inline(always)]
    pub fn read(&self, key: &FlowKey<F>, other: &mut FlowKey<F>) -> Option<(Facts, Making)> {
        let making = Making {
            proof: load!(self, proof),
            opened: load!(self, opened),
            ended: load!(self, ended),
        };
        Some((self.common().read(key, other)?, making))
    }

    /// Notes what the client acknowledges if it has heard the backend.
    #[inline(always)]
    pub fn set_proof(&self, proof: u32) {
        store!(self, proof, proof);
    }

    /// Notes that the flow has ended.
    #[inline(always)]
    pub fn end(&self, now: u32) {
        store!(self, ended, now);
        self.common().set_state(State::Closed);
    }
}
