//! Packets and cases for tests, shared by the host and the kernel. Behind feature `testing`; never
//! shipped.

mod cases;
mod packets;
mod records;
pub mod search;

pub use cases::{Becomes, Case, Hook, LINK, MTU, NODE, Service, Step, cases};
pub use packets::{Packet, Transport, ends, is_valid};
pub use records::Records;
