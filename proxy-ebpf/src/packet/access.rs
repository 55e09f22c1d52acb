//! The one door to packet memory.

use bytemuck::Pod;
use proxy_common::Family;
use proxy_common::checksum::Delta;
use proxy_common::tables::FlowKey;

/// A packet's bytes, from its link-layer header on: a socket buffer in the kernel, a vector in tests.
///
/// Values are copied in and out, never referenced: the kernel may move a packet's memory with any
/// change, and on the host its bytes have no alignment.
pub trait Frame {
    /// Where the network header begins: the length of the link-layer header.
    const NETWORK: usize;

    /// The index of the link that the packet is seen on.
    fn link(&self) -> u32;

    /// How many bytes of payload the packets have that this one is to be cut into; 0 if it is one
    /// packet.
    fn segment(&self) -> usize;

    /// Whether it has a mark, by which the host's policies may go.
    fn is_marked(&self) -> bool;

    /// Notes that it was led to a backend and is to be masqueraded if it leaves by an uplink: seen again there, by
    /// [`Frame::is_led`]. A program beside ours may make the host forget that.
    fn set_led(&mut self);

    /// Whether it was led to a backend by this node, and is to be masqueraded.
    fn is_led(&self) -> bool;

    /// Notes that this node has done with it: it is seen again only where it leaves, if it was sent on past the host stack or if
    /// a link lies on another one.
    fn set_done(&mut self);

    /// Whether this node has done with it.
    fn is_done(&self) -> bool;

    /// Notes that it was translated where it came in from a pod, and needs nothing where it leaves, unless the host has given it
    /// the node's address meanwhile.
    fn set_passed(&mut self);

    /// Whether it was translated where it came in from a pod.
    fn has_passed(&self) -> bool;

    /// Forgets what was noted: it has just come in, and another node's notes are none of ours.
    fn forget_notes(&mut self);

    /// How long the packet is, link-layer header included.
    fn length(&self) -> u32;

    /// Whether a socket of the host is at the other end of packets with these addresses: one that is
    /// connected, or for datagrams any that would get them.
    fn has_socket<F: Family>(&self, key: &FlowKey<F>) -> bool;

    /// Whether a socket of the host is bound to the very address and port that packets of this key go to.
    fn listens<F: Family>(&self, key: &FlowKey<F>) -> bool;

    /// How the host's routes and rules lead from one address to another, for a packet that it forwards. The neighbour there
    /// need not be known.
    fn route<F: Family>(&self, from: &F::Addr, to: &F::Addr) -> Route<F>;

    /// Makes the first `length` bytes reachable, if the packet is that long. A packet's end may lie in
    /// other memory than its start; loads and stores beyond what is reachable fail.
    fn want(&mut self, length: usize);

    /// The value at `offset`; `None` if the reachable part ends before it does.
    fn load<T: Pod>(&self, offset: usize) -> Option<T>;

    /// Stores `value` at `offset`; `None` if the reachable part ends before it does.
    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()>;

    /// The first `length` bytes from the network header on; `None` if the reachable part ends before they do.
    fn headers(&mut self, length: usize) -> Option<impl Window>;

    /// `length` bytes from `offset` on; `None` if the reachable part ends before they do.
    fn window(&mut self, offset: usize, length: usize) -> Option<impl Window>;

    /// Changes the packet's length, cutting off its end or adding zeros there, and makes all of it
    /// reachable.
    fn resize(&mut self, length: usize) -> Option<()>;

    /// Mends the transport checksum at `offset`: `pseudo` is the change of the addresses, which a
    /// checksum that hardware has yet to finish covers; `body` that of the bytes behind it, which it
    /// does not. With `optional` a zero means "no checksum" and stays (UDP, RFC 768).
    fn fix_l4<F: Family>(
        &mut self,
        offset: usize,
        pseudo: Delta,
        body: Delta,
        optional: bool,
    ) -> Option<()>;
}

/// How the host's routes lead somewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route<F: Family> {
    /// The link; 0 if they lead nowhere, or it can't be told: rules may go by the packet's mark, if it has one.
    pub link: u32,
    /// The gateway; the destination where there is none.
    pub hop: F::Addr,
}

/// A part of a packet whose bounds were checked once for all of it. Offsets count from its start.
pub trait Window {
    /// The value at `offset`; `None` if it does not lie in the window.
    fn load<T: Pod>(&self, offset: usize) -> Option<T>;

    /// Stores `value` at `offset`; `None` if that does not lie in the window.
    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()>;
}
