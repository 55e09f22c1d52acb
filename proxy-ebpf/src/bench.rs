//! What the bench needs in the kernel: a program that gives the packet its bytes back before another one sees it, one that does
//! nothing, and the floor, which is the least that a program has to do to translate a packet. Never shipped.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    all(feature = "lint", not(target_arch = "bpf")),
    allow(dead_code, reason = "on the host nothing calls the programs")
)]
#![cfg_attr(
    any(target_arch = "bpf", feature = "lint"),
    allow(
        clippy::cast_possible_truncation,
        clippy::needless_pass_by_value,
        reason = "halves of numbers are meant, lengths are small; the macro hands the context over"
    )
)]

#[cfg(any(target_arch = "bpf", feature = "lint"))]
mod programs {
    use aya_ebpf::bindings::{BPF_ANY, BPF_F_NO_PREALLOC, TC_ACT_UNSPEC};
    use aya_ebpf::btf_maps::{Array, HashMap, ProgramArray};
    use aya_ebpf::helpers::bpf_skb_store_bytes;
    use aya_ebpf::macros::{btf_map, classifier};
    use aya_ebpf::programs::TcContext;
    use proxy_common::bench::{FloorKey, FloorValue, Template};
    use proxy_common::checksum::Delta;

    const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

    #[btf_map(name = "template")]
    static TEMPLATE: Array<Template, 1> = Array::new();
    #[btf_map(name = "runs")]
    static RUNS: Array<u32, 1> = Array::new();
    #[btf_map(name = "next")]
    static NEXT: ProgramArray<1> = ProgramArray::new();
    #[btf_map(name = "floor_flows")]
    static FLOWS: HashMap<FloorKey, FloorValue, 2_097_152, ON_DEMAND> = HashMap::new();
    #[btf_map(name = "floor_services")]
    static SERVICES: HashMap<FloorKey, FloorValue, 65_536> = HashMap::new();

    /// Makes the packet that of the next flow, whatever the last run has made of it, and goes on with the program to be measured.
    #[classifier]
    #[inline(always)] // a tail call from a function of its own would return to this one
    pub fn restore(ctx: TcContext) -> i32 {
        let (Some(template), Some(runs)) = (TEMPLATE.get(0), RUNS.get_ptr_mut(0)) else {
            return TC_ACT_UNSPEC;
        };
        // SAFETY: only this program writes there, one run after the other.
        let run = unsafe {
            *runs = (*runs).wrapping_add(1);
            *runs
        };
        let flow = template.first + run.wrapping_mul(template.step) % template.flows.max(1);
        store(&ctx, 0, &template.bytes);
        let [host, port] = [(flow >> 14) as u16, (flow & 0x3fff) as u16 | 0x4000];
        store(&ctx, template.address, &host.to_be_bytes());
        store(&ctx, template.port, &port.to_be_bytes());
        // SAFETY: the context is the kernel's and outlives the program.
        unsafe { (*ctx.skb.skb).tc_index = 0 };
        // SAFETY: what is called is a classifier as this one is, and nothing here needs to be dropped.
        unsafe { NEXT.tail_call(&ctx, 0) };
        TC_ACT_UNSPEC
    }

    #[inline(always)]
    fn store<const N: usize>(ctx: &TcContext, offset: u32, bytes: &[u8; N]) {
        // SAFETY: the helper checks the offset.
        unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset, bytes.as_ptr().cast(), N as u32, 0) };
    }

    /// Does nothing: what it costs to get here.
    #[classifier]
    pub fn empty(_ctx: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    /// An IPv4 TCP packet without options behind an Ethernet header.
    #[repr(C)]
    struct Headers {
        ethernet: [u8; 12],
        ethertype: u16,
        version_ihl: u8,
        tos: u8,
        rest: [u8; 7],
        proto: u8,
        checksum: u16,
        src: [u16; 2],
        dst: [u16; 2],
        sport: u16,
        dport: u16,
        numbers: [u16; 6],
        tcp_checksum: u16,
        urgent: u16,
    }

    /// One parse, one look-up, one rewrite by direct access; for a new flow one look-up more and one insert. No states, no lifetimes, no
    /// counters, no IPv6.
    #[classifier]
    pub fn floor(ctx: TcContext) -> i32 {
        let start = ctx.data();
        if start + size_of::<Headers>() > ctx.data_end() {
            return TC_ACT_UNSPEC;
        }
        // SAFETY: the bounds are checked, and the program owns the packet while it runs. eBPF allows what is not aligned.
        let packet = unsafe { &mut *(start as *mut Headers) };
        let is_plain = packet.ethertype == 0x0800_u16.to_be() && packet.version_ihl == 0x45;
        if !is_plain || packet.proto != 6 {
            return TC_ACT_UNSPEC;
        }
        let key = FloorKey {
            src: packet.src,
            dst: packet.dst,
            sport: packet.sport,
            dport: packet.dport,
            proto: 6,
        };
        // SAFETY: copied at once.
        let value = if let Some(value) = unsafe { FLOWS.get(key).copied() } {
            value
        } else {
            let service = FloorKey { src: [0; 2], sport: 0, ..key };
            // SAFETY: copied at once.
            let Some(value) = (unsafe { SERVICES.get(service).copied() }) else {
                return TC_ACT_UNSPEC;
            };
            let _ = FLOWS.insert(key, value, u64::from(BPF_ANY));
            value
        };
        let FloorValue { address, port, .. } = value;
        let addresses = Delta::default().word(bytemuck::cast(packet.dst), bytemuck::cast(address));
        let all = addresses.word(packet.dport.into(), port.into());
        packet.checksum = addresses.apply(packet.checksum);
        packet.tcp_checksum = all.apply(packet.tcp_checksum);
        (packet.dst, packet.dport) = (address, port);
        TC_ACT_UNSPEC
    }
}

#[cfg(target_arch = "bpf")]
mod terms;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
