//! A packet as a vector.

use std::net::{IpAddr, SocketAddr};

use bytemuck::Pod;
use proxy_common::checksum::Delta;
use proxy_common::tables::FlowKey;
use proxy_common::testing::LINK;
use proxy_common::{Family, Port};

use super::index;
use crate::packet::{Frame, Route, Window};

/// What we have noted on a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Note {
    /// Nothing.
    None,
    /// The node has done with it.
    Done,
    /// It was translated where it came in from a pod.
    Passed,
    /// It was led to a backend, to be masqueraded if it leaves.
    Led,
}

/// A packet whose end may lie in other memory than its start, as a socket buffer's.
#[derive(Clone)]
pub struct Buffer {
    /// Its bytes.
    pub bytes: Vec<u8>,
    reachable: usize,
    /// Whether it may be changed.
    pub writable: bool,
    /// Whether hardware has yet to finish its transport checksum, which then covers the addresses only and is
    /// no complement.
    pub unfinished: bool,
    /// What was noted on it, which it has with it through the host stack.
    pub note: Note,
    /// Its mark.
    pub mark: u32,
    /// The payload of the packets that it is to be cut into.
    pub segment: usize,
    /// Sockets of the host: who is at the other end of each, and where it is.
    pub sockets: Vec<(SocketAddr, SocketAddr)>,
    /// Addresses that sockets of the host are bound to.
    pub listeners: Vec<SocketAddr>,
    /// Links that lead to addresses.
    pub routes: Vec<(IpAddr, u32)>,
}

impl Buffer {
    /// A packet of which nothing is reachable yet.
    pub fn new(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            reachable: 0,
            writable: true,
            unfinished: false,
            note: Note::None,
            mark: 0,
            segment: 0,
            sockets: Vec::new(),
            listeners: Vec::new(),
            routes: Vec::new(),
        }
    }

    fn end<T>(&self, offset: usize) -> Option<usize> {
        offset.checked_add(size_of::<T>()).filter(|end| *end <= self.reachable)
    }
}

impl Frame for Buffer {
    const NETWORK: usize = 14;

    fn link(&self) -> u32 {
        LINK
    }

    fn segment(&self) -> usize {
        self.segment
    }

    fn is_marked(&self) -> bool {
        self.mark != 0
    }

    fn set_led(&mut self) {
        self.note = Note::Led;
    }

    fn is_led(&self) -> bool {
        self.note == Note::Led
    }

    fn set_passed(&mut self) {
        self.note = Note::Passed;
    }

    fn has_passed(&self) -> bool {
        self.note == Note::Passed
    }

    fn set_done(&mut self) {
        self.note = Note::Done;
    }

    fn is_done(&self) -> bool {
        self.note == Note::Done
    }

    fn forget_notes(&mut self) {
        self.note = Note::None;
    }

    fn length(&self) -> u32 {
        index(self.bytes.len())
    }

    fn has_socket<F: Family>(&self, key: &FlowKey<F>) -> bool {
        let end = |address: F::Addr, port: Port| SocketAddr::new(address.into(), port.number());
        self.sockets.contains(&(end(key.src, key.sport), end(key.dst, key.dport)))
    }

    fn listens<F: Family>(&self, key: &FlowKey<F>) -> bool {
        self.listeners.contains(&SocketAddr::new(key.dst.into(), key.dport.number()))
    }

    fn route<F: Family>(&self, _: &F::Addr, to: &F::Addr) -> Route<F> {
        let address: IpAddr = (*to).into();
        let link = self.routes.iter().find(|(known, _)| *known == address).map(|(_, link)| *link);
        Route { link: link.filter(|_| self.mark == 0).unwrap_or(0), hop: *to }
    }

    fn want(&mut self, length: usize) {
        self.reachable = self.reachable.max(length.min(self.bytes.len()));
    }

    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let end = self.end::<T>(offset)?;
        Some(bytemuck::pod_read_unaligned(&self.bytes[offset..end]))
    }

    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        let end = self.end::<T>(offset).filter(|_| self.writable)?;
        self.bytes[offset..end].copy_from_slice(bytemuck::bytes_of(&value));
        Some(())
    }

    fn headers(&mut self, length: usize) -> Option<impl Window> {
        self.window(Self::NETWORK, length)
    }

    fn window(&mut self, offset: usize, length: usize) -> Option<impl Window> {
        let end = offset.checked_add(length).filter(|end| *end <= self.reachable)?;
        Some(Bytes { bytes: &mut self.bytes[offset..end], writable: self.writable })
    }

    fn resize(&mut self, length: usize) -> Option<()> {
        self.bytes.resize(length, 0);
        self.reachable = length;
        self.writable.then_some(())
    }

    fn fix_l4<F: Family>(
        &mut self,
        offset: usize,
        pseudo: Delta,
        body: Delta,
        optional: bool,
    ) -> Option<()> {
        let place = self.bytes.get_mut(offset..offset + 2)?;
        let old = u16::from_ne_bytes([place[0], place[1]]);
        if optional && old == 0 {
            return Some(());
        }
        let new = if self.unfinished { !pseudo.apply(!old) } else { (pseudo + body).apply(old) };
        let new = if optional && new == 0 { 0xffff } else { new };
        place.copy_from_slice(&new.to_ne_bytes());
        self.writable.then_some(())
    }
}

/// A part of a [`Buffer`].
struct Bytes<'a> {
    bytes: &'a mut [u8],
    writable: bool,
}

impl Window for Bytes<'_> {
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        self.bytes.get(offset..offset + size_of::<T>()).map(bytemuck::pod_read_unaligned)
    }

    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        let place = self.bytes.get_mut(offset..offset + size_of::<T>());
        place.filter(|_| self.writable)?.copy_from_slice(bytemuck::bytes_of(&value));
        Some(())
    }
}
