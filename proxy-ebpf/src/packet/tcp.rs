//! TCP's header (RFC 9293), as far as a load balancer looks into it.

use bytemuck::{Pod, Zeroable};
use proxy_common::Port;

/// The sender has finished.
pub const FIN: u8 = 0x01;
/// Opens a connection.
pub const SYN: u8 = 0x02;
/// Aborts a connection.
pub const RST: u8 = 0x04;
/// The acknowledgement number counts.
pub const ACK: u8 = 0x10;

/// Where the data offset and the flags lie.
pub const OFFSET_AND_FLAGS: usize = 12;
/// Where the checksum lies.
pub const CHECKSUM: usize = 16;
/// Where UDP's checksum lies.
pub const UDP_CHECKSUM: usize = 6;

/// The fixed header. Numbers are big-endian bytes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// Sequence number.
    pub sequence: [u8; 4],
    /// Acknowledgement number.
    pub acknowledgement: [u8; 4],
    /// Header length in 32-bit words, in the upper four bits.
    pub offset: u8,
    /// Flags.
    pub flags: u8,
    /// Receive window.
    pub window: [u8; 2],
    /// Checksum, in the byte order of memory.
    pub checksum: u16,
    /// Urgent pointer.
    pub urgent: [u8; 2],
}
