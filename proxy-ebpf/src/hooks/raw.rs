//! A packet at XDP as a [`Frame`]: bytes as they came from the wire, in one piece.

use aya_ebpf::helpers::bpf_xdp_adjust_tail;
use aya_ebpf::programs::XdpContext;
use bytemuck::Pod;
use core::ffi::c_void;
use proxy_common::Family;
use proxy_common::checksum::Delta;
use proxy_common::tables::FlowKey;
use proxy_ebpf::packet::{Frame, Route, Window};

use super::window::Memory;

/// A packet with an Ethernet header. Of sockets and routes it knows nothing, and notes are nowhere to be put: it is sent on
/// past the hooks that look for them.
pub struct Raw<'a> {
    ctx: &'a XdpContext,
}

impl<'a> Raw<'a> {
    #[inline(always)]
    pub const fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx }
    }

    /// The `EtherType` in host byte order; 0 if the packet has none.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        self.load(12).map_or(0, u16::from_be)
    }

    /// What helpers want.
    #[inline(always)]
    pub fn context(&self) -> *mut c_void {
        self.ctx.ctx.cast()
    }
}

impl Memory for Raw<'_> {
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (&raw const (*self.ctx.ctx).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.ctx.data_end()
    }
}

impl Frame for Raw<'_> {
    const NETWORK: usize = 14;

    #[inline(always)]
    fn link(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn segment(&self) -> usize {
        0
    }

    #[inline(always)]
    fn is_marked(&self) -> bool {
        false
    }

    #[inline(always)]
    fn set_led(&mut self) {}

    #[inline(always)]
    fn is_led(&self) -> bool {
        false
    }

    #[inline(always)]
    fn set_done(&mut self) {}

    #[inline(always)]
    fn set_passed(&mut self) {}

    #[inline(always)]
    fn has_passed(&self) -> bool {
        false
    }

    #[inline(always)]
    fn is_done(&self) -> bool {
        false
    }

    #[inline(always)]
    fn forget_notes(&mut self) {}

    #[inline(always)]
    fn length(&self) -> u32 {
        (self.end() - self.data()) as u32
    }

    #[inline(always)]
    fn has_socket<F: Family>(&self, _: &FlowKey<F>) -> bool {
        false
    }

    #[inline(always)]
    fn listens<F: Family>(&self, _: &FlowKey<F>) -> bool {
        false
    }

    #[inline(always)]
    fn route<F: Family>(&self, _: &F::Addr, to: &F::Addr) -> Route<F> {
        Route { link: 0, hop: *to }
    }

    #[inline(always)]
    fn want(&mut self, _: usize) {}

    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        self.bytes_at(offset, size_of::<T>())?.load(0)
    }

    #[inline(always)]
    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        self.bytes_at(offset, size_of::<T>())?.store(0, value)
    }

    #[inline(always)]
    fn headers(&mut self, length: usize) -> Option<impl Window> {
        self.bytes(Self::NETWORK, length)
    }

    #[inline(always)]
    fn window(&mut self, offset: usize, length: usize) -> Option<impl Window> {
        self.bytes_at(offset, length)
    }

    #[inline(always)]
    fn resize(&mut self, length: usize) -> Option<()> {
        let more = (length as u32).wrapping_sub(self.length()).cast_signed();
        // SAFETY: the helper checks all; pointers into the packet are made anew after it.
        (unsafe { bpf_xdp_adjust_tail(self.ctx.ctx, more) } == 0).then_some(())
    }

    /// Nobody else has a sum of the packet, and none is left to be finished.
    #[inline(always)]
    fn fix_l4<F: Family>(
        &mut self,
        offset: usize,
        pseudo: Delta,
        body: Delta,
        optional: bool,
    ) -> Option<()> {
        let sum: u16 = self.load(offset)?;
        if optional && sum == 0 {
            return Some(());
        }
        let sum = (pseudo + body).apply(sum);
        self.store(offset, if optional && sum == 0 { 0xffff } else { sum })
    }
}
