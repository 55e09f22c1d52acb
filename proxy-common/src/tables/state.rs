//! How far a flow has come.

/// How far one direction of a flow has come. The numbers are in the maps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum State {
    /// The client's: it has asked. The backend's: nothing was heard of it.
    Opening = 0,
    /// The backend's: it has answered, TCP with its SYN-ACK.
    Answered = 1,
    /// The backend's: heard of in the middle of a connection that no record was found of.
    Heard = 2,
    /// Both sides have shown that they hear each other.
    Established = 3,
    /// TCP: a FIN was seen in this direction.
    Finished = 4,
    /// TCP: a reset, or a FIN of both sides. The flow has ended, as far as can be seen.
    Closed = 5,
    /// TCP: this direction goes on after the end, which then was none.
    Revived = 6,
    /// Not ours to translate: noted, so that nobody else gets its place.
    Foreign = 7,
}

impl State {
    /// The state of that number; a number that is none is not ours to translate.
    #[inline(always)]
    pub const fn of(number: u8) -> Self {
        match number {
            0 => Self::Opening,
            1 => Self::Answered,
            2 => Self::Heard,
            3 => Self::Established,
            4 => Self::Finished,
            5 => Self::Closed,
            6 => Self::Revived,
            _ => Self::Foreign,
        }
    }

    /// The state's name in listings.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Answered => "answered",
            Self::Heard => "heard",
            Self::Established => "established",
            Self::Finished => "finished",
            Self::Closed => "closed",
            Self::Revived => "revived",
            Self::Foreign => "foreign",
        }
    }
}
