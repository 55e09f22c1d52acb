//! A socket buffer as a [`Frame`].

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use bytemuck::Pod;
use proxy_common::Family;
use proxy_common::V6;
use proxy_common::checksum::Delta;
use proxy_common::tables::FlowKey;
use proxy_ebpf::datapath::Tables;
use proxy_ebpf::packet::{Frame, Route, Window};

use super::host;
use super::window::Memory;
use crate::maps::Tables6;

/// What a packet's `tc_index` says that the node has done with. Others write that field (clsact for a
/// class that a verdict names, the qdiscs gred and dsmark), but not this number: a class of that minor number
/// is nobody's.
const DONE: u32 = 0x506f;
/// What it says that was led to a backend, and is to be masqueraded if it leaves by an uplink. Where a classifier beside
/// ours overwrites it, that is found out by a look-up, but for packets in the middle of a connection whose record is lost.
const LED: u32 = 0x5070;
/// What it says that was translated where it came in from a pod.
const PASSED: u32 = 0x5071;
/// `BPF_F_IPV6`, which aya's bindings do not name: the address of an IPv6 packet changes, where no
/// header checksum makes up for it in a sum that hardware took of the whole packet.
const BPF_F_IPV6: u64 = 1 << 7;

/// A socket buffer at tc. Its packet pointers are read from the context at each access: any helper
/// that may change the packet makes older ones invalid.
///
/// `NETWORK` is the length of the link's own header: 14 with Ethernet, 0 with none.
pub struct Skb<'a, const NETWORK: usize> {
    ctx: &'a TcContext,
}

impl<'a, const NETWORK: usize> Skb<'a, NETWORK> {
    #[inline(always)]
    pub const fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }

    /// Notes that the node has done with the packet.
    #[inline(always)]
    pub fn mark_done(ctx: &TcContext) {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*ctx.skb.skb).tc_index = DONE };
    }

    /// The `EtherType` in host byte order. The kernel keeps VLAN tags aside, so it is the inner one.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        // SAFETY: the context is the kernel's and outlives the program.
        u16::from_be(unsafe { (*self.ctx.skb.skb).protocol } as u16)
    }

    /// Whether the packet belongs to a VLAN of this link: it is the VLAN's own link that sees it as one
    /// of its packets.
    #[inline(always)]
    pub fn is_of_vlan(&self) -> bool {
        // SAFETY: the context is the kernel's and outlives the program.
        let (present, tag) =
            unsafe { ((*self.ctx.skb.skb).vlan_present, (*self.ctx.skb.skb).vlan_tci) };
        present != 0 && tag & 0xfff != 0
    }
}

impl<const NETWORK: usize> Memory for Skb<'_, NETWORK> {
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (&raw const (*self.ctx.skb.skb).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.ctx.data_end()
    }
}

impl<const NETWORK: usize> Frame for Skb<'_, NETWORK> {
    const NETWORK: usize = NETWORK;

    #[inline(always)]
    fn link(&self) -> u32 {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn segment(&self) -> usize {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).gso_size as usize }
    }

    #[inline(always)]
    fn is_marked(&self) -> bool {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).mark != 0 }
    }

    #[inline(always)]
    fn set_led(&mut self) {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).tc_index = LED };
    }

    #[inline(always)]
    fn is_led(&self) -> bool {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).tc_index == LED }
    }

    #[inline(always)]
    fn set_done(&mut self) {
        Self::mark_done(self.ctx);
    }

    #[inline(always)]
    fn is_done(&self) -> bool {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).tc_index == DONE }
    }

    #[inline(always)]
    fn set_passed(&mut self) {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).tc_index = PASSED };
    }

    #[inline(always)]
    fn has_passed(&self) -> bool {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*self.ctx.skb.skb).tc_index == PASSED }
    }

    #[inline(always)]
    fn forget_notes(&mut self) {
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe {
            // Mostly there is none, and a write would cost more than a look.
            if (*self.ctx.skb.skb).tc_index != 0 {
                (*self.ctx.skb.skb).tc_index = 0;
            }
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn has_socket<F: Family>(&self, key: &FlowKey<F>) -> bool {
        host::has_socket(self.ctx, key)
    }

    #[inline(always)]
    fn listens<F: Family>(&self, key: &FlowKey<F>) -> bool {
        host::listens(self.ctx.skb.skb.cast(), key)
    }

    #[inline(always)]
    fn route<F: Family>(&self, from: &F::Addr, to: &F::Addr) -> Route<F> {
        // Before Linux 6.10 the kernel can't be asked for a packet with a mark.
        if self.is_marked() {
            Route { link: 0, hop: *to }
        } else {
            host::route::<F>(self.ctx, self.link(), from, to)
        }
    }

    #[inline(always)]
    fn want(&mut self, length: usize) {
        let reachable = self.ctx.data_end() - self.ctx.data();
        let packet = self.ctx.len() as usize;
        if reachable < length && reachable < packet {
            // A failure shows as loads that fail.
            let _ = self.ctx.pull_data(length.min(packet) as u32);
        }
    }

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
        self.bytes(NETWORK, length)
    }

    #[inline(always)]
    fn window(&mut self, offset: usize, length: usize) -> Option<impl Window> {
        self.bytes_at(offset, length)
    }

    #[inline(always)]
    fn resize(&mut self, length: usize) -> Option<()> {
        // SAFETY: the helper checks the length; packet pointers are read anew afterwards.
        let result = unsafe { bpf_skb_change_tail(self.ctx.skb.skb, length as u32, 0) };
        self.want(length);
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn fix_l4<F: Family>(
        &mut self,
        offset: usize,
        pseudo: Delta,
        body: Delta,
        optional: bool,
    ) -> Option<()> {
        let keep_zero = if optional { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        if pseudo != Delta::default() {
            let flags = keep_zero | u64::from(BPF_F_PSEUDO_HDR);
            if F::ETHERTYPE != V6::ETHERTYPE {
                self.replace_sum(offset, pseudo, flags)?;
            } else if Tables::<V6>::setting(&Tables6, |s| &s.ipv6_sums) != 0 {
                self.replace_sum(offset, pseudo, flags | BPF_F_IPV6)?;
            } else {
                self.replace_sum(offset, pseudo, flags)?;
                // The helper takes the change out of a sum that hardware took of the whole packet, as if
                // a header's checksum made up for it. IPv6 has none: it is put back.
                // SAFETY: the helper only changes that sum, if there is one.
                unsafe { bpf_csum_update(self.ctx.skb.skb, pseudo.fold().into()) };
            }
        }
        if body == Delta::default() {
            return Some(());
        }
        self.replace_sum(offset, body, keep_zero)
    }
}

impl<const NETWORK: usize> Skb<'_, NETWORK> {
    #[inline(always)]
    fn replace_sum(&mut self, offset: usize, delta: Delta, flags: u64) -> Option<()> {
        // SAFETY: the helper checks the offset; packet pointers are read anew afterwards.
        let result = unsafe {
            bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, 0, u64::from(delta.fold()), flags)
        };
        (result == 0).then_some(())
    }
}
