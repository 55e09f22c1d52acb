//! What goes into a plan and what comes out of it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::tables::Choice;

use crate::desired::{Frontend, Port, PortId};
use crate::model::IpFamily;

/// One write to the kernel's maps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Writes a backend; without flags if it is withdrawn.
    Backend {
        /// The family's table.
        family: IpFamily,
        /// The backend's number.
        number: u32,
        /// What to write.
        backend: BackendEntry,
    },
    /// Writes slots that follow each other.
    Slots {
        /// The first slot.
        first: u32,
        /// What is written: positions, or backends' numbers.
        numbers: Vec<u32>,
    },
    /// Names a Service port.
    Name {
        /// Its number.
        id: u32,
        /// Its identity.
        port: PortId,
    },
    /// Forgets a Service port's name.
    Unname {
        /// Its number.
        id: u32,
    },
    /// Leads a frontend to a run of slots. This is the switch.
    Lead {
        /// The frontend.
        frontend: Frontend,
        /// Where it leads.
        lead: Lead,
    },
    /// Removes a frontend.
    Remove {
        /// The frontend.
        frontend: Frontend,
    },
    /// Says what an address is: flags of [`ServiceValue`].
    Mark {
        /// The address.
        address: IpAddr,
        /// The flags.
        flags: u32,
    },
    /// Takes an address's mark away.
    Unmark {
        /// The address.
        address: IpAddr,
    },
    /// Lets clients in a range ask a Service port that has source ranges; or pods go there with their own
    /// address.
    Allow {
        /// The Service port's number; 0 for pods.
        id: u32,
        /// The range.
        range: IpNet,
    },
    /// Takes that back.
    Forbid {
        /// The Service port's number.
        id: u32,
        /// The range.
        range: IpNet,
    },
}

/// Where a frontend leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lead {
    /// The Service port's number.
    pub id: u32,
    /// The whole cluster's backends.
    pub cluster: Choice,
    /// This node's backends.
    pub local: Choice,
    /// For how many ticks a client stays with its backend.
    pub affinity: u32,
    /// Flags of [`ServiceValue`].
    pub flags: u32,
}

/// A backend as it is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, each with a name")]
pub struct BackendEntry {
    /// Its address and port.
    pub address: SocketAddr,
    /// The generation of its number.
    pub generation: u16,
    /// Keeps the flows that it has.
    pub serving: bool,
    /// Runs on this node.
    pub local: bool,
    /// Takes new flows.
    pub usable: bool,
    /// Takes new flows that stay on this node.
    pub usable_local: bool,
    /// Its flows are counted: least-conn chooses by their number.
    pub counted: bool,
    /// Its share of new flows, beside those of others.
    pub weight: u16,
    /// The Service port's number.
    pub service: u32,
}

impl BackendEntry {
    /// Whether it takes packets and is on another node.
    pub const fn is_remote(&self) -> bool {
        self.serving && !self.local
    }

    /// The backend, gone.
    pub(super) fn withdrawn(self) -> Self {
        Self { serving: false, usable: false, usable_local: false, ..self }
    }
}

/// What can't be done, in words for the operator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A table is full: what was to be added is not, what was to go has gone.
    Full {
        /// The Service port.
        port: PortId,
        /// The table.
        table: &'static str,
    },
    /// Another Service's port has the frontend.
    Taken {
        /// The Service port that does not get it.
        port: PortId,
        /// The frontend.
        frontend: Frontend,
        /// Who has it.
        holder: PortId,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { table, .. } => write!(
                f,
                "the table of {table} is full, so not all that was to be added is; what was to go has gone. \
                 --table-size gives more room"
            ),
            Self::Taken { frontend, holder, .. } => {
                let at = SocketAddr::new(frontend.vip, frontend.port);
                write!(f, "{at} belongs to the older {holder}")
            }
        }
    }
}

/// A change of a Service port: what is wanted of it, or that it is gone.
pub type Change = (PortId, Option<Port>);

/// How much each table holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// Service ports; and, of each family, frontends with the marks of their addresses.
    pub services: u32,
    /// Slots.
    pub slots: u32,
    /// Backends of each family.
    pub backends: u32,
    /// Source ranges of each family.
    pub ranges: u32,
}

impl Capacity {
    /// For 30,000 Service ports of ten endpoints.
    pub const DEFAULT: Self =
        Self { services: 131_072, slots: 4_194_304, backends: 327_680, ranges: 65_536 };
    /// For 100,000.
    pub const LARGE: Self =
        Self { services: 262_144, slots: 14_680_064, backends: 1_114_112, ranges: 65_536 };
    /// For a few hundred.
    pub const SMALL: Self =
        Self { services: 8_192, slots: 131_072, backends: 16_384, ranges: 4_096 };
}

/// The flags of the facts that hold.
pub(crate) fn flags_of(facts: &[(bool, u32)]) -> u32 {
    let set = facts.iter().filter(|(holds, _)| *holds);
    set.fold(0, |flags, (_, flag)| flags | flag)
}
