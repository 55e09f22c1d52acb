//! Packets and cases for tests, shared by the host and the kernel. Behind feature `testing`; never
//! shipped.

mod cases;
mod packets;

pub use cases::{Becomes, Case, Hook, LINK, MTU, NODE, Service, Step, cases};
pub use packets::{Packet, Transport, ends, is_valid};
