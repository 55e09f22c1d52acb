//! TCP's header (RFC 9293), as far as a load balancer looks into it.

use bytemuck::{Pod, Zeroable};
use proxy_common::Port;
use proxy_common::tables::Packet;

use super::{Frame, Wire};

/// The sender has finished.
pub const FIN: u8 = 0x01;
/// Opens a connection.
pub const SYN: u8 = 0x02;
/// Aborts a connection.
pub const RST: u8 = 0x04;
/// The acknowledgement number counts.
pub const ACK: u8 = 0x10;

/// Where the sequence and the acknowledgement number lie.
pub const NUMBERS: usize = 4;
/// Where the data offset and the flags lie.
pub const OFFSET_AND_FLAGS: usize = 12;
/// Where the checksum lies.
pub const CHECKSUM: usize = 16;
/// The length of UDP's header.
pub const UDP_HEADER: usize = 8;
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

/// Whether a segment with these flags asks for a connection.
#[inline(always)]
pub const fn opens(flags: u8) -> bool {
    flags & (SYN | ACK) == SYN
}

/// A segment's sequence and acknowledgement number.
#[inline(always)]
pub fn numbers<P: Frame>(frame: &P, packet: &Packet) -> Option<[u32; 2]> {
    let [sequence, acknowledgement]: [[u8; 4]; 2] = frame.load(packet.l4() + NUMBERS)?;
    Some([u32::from_be_bytes(sequence), u32::from_be_bytes(acknowledgement)])
}

/// How many sequence numbers a segment takes up.
#[inline(always)]
pub fn sequence_length<F: Wire, P: Frame>(frame: &P, packet: &Packet) -> Option<u32> {
    let [offset, _]: [u8; 2] = frame.load(packet.l4() + OFFSET_AND_FLAGS)?;
    let end = P::NETWORK + F::total_length(frame, P::NETWORK)?;
    let payload = end.wrapping_sub(packet.l4() + usize::from(offset >> 4) * 4);
    let controls = u32::from(packet.flags & SYN != 0) + u32::from(packet.flags & FIN != 0);
    Some((payload as u32).wrapping_add(controls))
}
